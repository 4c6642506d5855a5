"""A small world of drawn avatars on which the whole stack from photo to LoRA trains without
downloads.

``AvatarIdentity`` holds what a LoRA must learn, ``Scene`` what prompts describe. Both are
deterministic in a seed.
"""
