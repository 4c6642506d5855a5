"""A small drawn world of people, complete enough to train and test a whole LoRA-from-photo stack without downloads.

``Identity`` is who a person is (what a LoRA must carry), ``Scene`` is everything a prompt may ask for; both are
deterministic in a seed. ``draw`` makes the picture, ``caption``/``prompt`` the words, ``edited`` an exact
before/after pair, ``Portraits`` the drawn dataset on disk.
"""

from data_builder.avatars.captions import caption, prompt
from data_builder.avatars.drawing import draw
from data_builder.avatars.edits import EDITS, edited
from data_builder.avatars.people import SPLITS, Identity, Scene, identity, scene

__all__ = ["EDITS", "SPLITS", "Identity", "Scene", "caption", "draw", "edited", "identity", "prompt", "scene"]
