"""A released model: its card travels with it and says how strong its LoRAs are."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_builder.release.share_weights import share_weights
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.pipelines.image_to_lora import ImageToLora


def test_the_strength_of_its_card_multiplies_what_it_makes(bundle: Any, tmp_path: Path) -> None:
    base = load_diffusion_base(bundle.base)
    model = ImageToLora.from_pretrained(bundle.model, base=base)
    photo = Image.linear_gradient("L").resize((20, 20)).convert("RGB")
    plain = model(photo).weights
    model.card = replace(model.card, strength=1.5)
    model.save_pretrained(tmp_path / "stronger")
    stronger = ImageToLora.from_pretrained(tmp_path / "stronger", base=base)
    torch.testing.assert_close(
        stronger(photo).weights.compute_delta_norms(),
        plain.compute_delta_norms() * 1.5,
        rtol=1e-2,
        atol=1e-3,
    )  # stored as fp16
    torch.testing.assert_close(
        stronger(photo, strength=0.5).weights.compute_delta_norms(),
        stronger(photo).weights.compute_delta_norms() * 0.5,
    )


def test_a_model_borrows_a_part_from_the_one_beside_it(bundle: Any, tmp_path: Path) -> None:
    photo = bundle.photo
    for name in ("lender", "borrower"):
        shutil.copytree(bundle.model, tmp_path / name)
    wanted = ImageToLora.from_pretrained(tmp_path / "borrower")(photo).weights
    size = (tmp_path / "borrower" / "model.safetensors").stat().st_size
    saved = share_weights(tmp_path / "borrower", "encoder", "lender")
    assert size - (tmp_path / "borrower" / "model.safetensors").stat().st_size >= saved > 0
    model = ImageToLora.from_pretrained(tmp_path / "borrower")
    assert torch.equal(model(photo).weights.flatten(), wanted.flatten())
    model.save_pretrained(tmp_path / "elsewhere" / "whole")  # stands alone again
    assert torch.equal(
        ImageToLora.from_pretrained(tmp_path / "elsewhere" / "whole")(photo).weights.flatten(),
        wanted.flatten(),
    )
    (tmp_path / "lender" / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="shares its encoder"):
        ImageToLora.from_pretrained(tmp_path / "borrower")


def test_another_part_is_not_borrowed(bundle: Any, tmp_path: Path) -> None:
    for name in ("lender", "borrower"):
        shutil.copytree(bundle.model, tmp_path / name)
    model = ImageToLora.from_pretrained(tmp_path / "lender")
    next(model.encoder.parameters()).data.add_(1)
    model.save_pretrained(tmp_path / "lender")
    with pytest.raises(InvalidArgumentError, match="is not that of lender"):
        share_weights(tmp_path / "borrower", "encoder", "lender")
