"""A small drawn world of people, complete enough to train and test a whole LoRA-from-photo stack without downloads.

``AvatarIdentity`` is who a person is (what a LoRA must carry), ``Scene`` is everything a prompt may ask for; both are
deterministic in a seed.
"""
