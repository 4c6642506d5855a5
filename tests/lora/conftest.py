"""Hypothesis without deadline; every test draws the same random numbers, alone or with others."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("tensors", deadline=None, max_examples=40, database=None)
settings.load_profile("tensors")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
