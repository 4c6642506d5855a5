"""Hypothesis without deadline."""

from hypothesis import settings

settings.register_profile("tensors", deadline=None, max_examples=40, database=None)
settings.load_profile("tensors")
