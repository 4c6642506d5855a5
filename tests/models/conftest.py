"""Every test of a model draws the same random numbers, alone or with others."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
