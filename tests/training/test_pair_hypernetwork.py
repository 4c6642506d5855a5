"""Arguments that the training of a pair hypernetwork refuses."""

from pathlib import Path

import pytest

from hyperlora.errors import InvalidArgumentError
from hyperlora.training.modules.pair_hypernetwork import PairHypernetworkTraining


def test_pair_hypernetwork_training_refuses_a_broken_vocabulary(
    workspace: Path, tmp_path: Path
) -> None:
    options = {
        "base": str(workspace / "tiny/instruct_pix2pix"),
        "encoder": "resnet10t",
        "output_dir": str(tmp_path),
    }
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.json", "broken.json"):
        head_options = {
            "num_text_tokens": 4,
            "cross_attention_dim": 8,
            "vocabulary": str(tmp_path / name),
        }
        with pytest.raises(
            InvalidArgumentError, match=rf"{name}' is no JSON file.*data_builder draw-pairs"
        ):
            PairHypernetworkTraining(**options, network={"instruction_head": head_options})


def test_pair_hypernetwork_training_refuses_to_have_no_loss(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="there is no loss to train on"):
        PairHypernetworkTraining(
            base="", encoder="", output_dir=str(tmp_path), use_denoising_loss=False
        )
