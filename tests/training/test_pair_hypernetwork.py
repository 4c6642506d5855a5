"""What the training of a pair network refuses."""

from pathlib import Path

import pytest

from hyperlora.errors import InvalidArgumentError
from hyperlora.training.modules.pair_hypernetwork import PairHypernetworkTraining


def test_a_vocabulary_that_is_not_there_is_told(workspace: Path, tmp_path: Path) -> None:
    options = {"base": str(workspace / "tiny/ip2p"), "encoder": "resnet10t", "out": str(tmp_path)}
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.json", "broken.json"):
        words = {"tokens": 4, "width": 8, "vocabulary": str(tmp_path / name)}
        with pytest.raises(
            InvalidArgumentError, match=rf"{name}' is no JSON file.*data_builder edits"
        ):
            PairHypernetworkTraining(**options, network={"words": words})
