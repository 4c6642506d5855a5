"""A released model: its card, the weights it shares with another, and the files of its LoRAs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_builder.release.share_weights import share_weights
from hyperlora.data.images import compute_sha256
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.lora.io.load import load_lora
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.lora_diffusion import LoraDiffusion
from hyperlora.pipelines.model_card import ModelCard
from hyperlora.pipelines.pair_to_lora import PairToLora


def test_image_to_lora_scales_loras_by_card_strength(bundle: Any, tmp_path: Path) -> None:
    base = load_diffusion_base(bundle.base)
    model = ImageToLora.from_pretrained(bundle.model, base=base)
    photo = Image.linear_gradient("L").resize((20, 20)).convert("RGB")
    plain_lora = model(photo).weights
    model.card = replace(model.card, strength=1.5)
    model.save_pretrained(tmp_path / "stronger")
    stronger_model = ImageToLora.from_pretrained(tmp_path / "stronger", base=base)
    stronger_lora = stronger_model(photo).weights
    torch.testing.assert_close(
        stronger_lora.compute_delta_norms(),
        plain_lora.compute_delta_norms() * 1.5,
        rtol=1e-2,
        atol=1e-3,
    )  # stored as fp16
    torch.testing.assert_close(
        stronger_model(photo, strength=0.5).weights.compute_delta_norms(),
        stronger_lora.compute_delta_norms() * 0.5,
    )


def test_image_to_lora_saves_complete_metadata(bundle: Any, tmp_path: Path) -> None:
    """The first program of the README, with a card as released models have it."""
    model = ImageToLora.from_pretrained(bundle.model)
    model.card = ModelCard(
        trigger_phrase="sks person",
        license="apache-2.0",
        architecture="stable-diffusion-v1",
        resolution=16,
    )
    model.save_pretrained(tmp_path / "model")
    photos = [str(bundle.photo), bundle.photo.with_name("1.png").read_bytes()]
    path = ImageToLora.from_pretrained(tmp_path / "model")(photos).save(tmp_path / "me.safetensors")
    metadata = load_lora(path).metadata
    assert metadata.architecture == "stable-diffusion-v1"
    assert (metadata.title, metadata.trigger_phrase) == ("0", "sks person")
    assert (metadata.license, metadata.resolution) == ("apache-2.0", (16, 16))
    assert metadata.encoder == "vit_tiny_patch16_224"
    assert metadata.encoder_license == model.encoder.license != ""
    assert metadata.reference_sha256 == tuple(compute_sha256(photo) for photo in photos)
    assert metadata.base_model == model.layout.base


def test_pair_to_lora_saves_complete_metadata(bundle: Any, tmp_path: Path) -> None:
    model = PairToLora.from_pretrained(bundle.pair_model)
    folder = bundle.edit_benchmark / "inverted"
    pair = folder / "shown-0_before.png", folder / "shown-0_after.png"
    metadata = load_lora(model(pair).save(tmp_path / "edit.safetensors")).metadata
    assert metadata.architecture == "stable-diffusion-v1"
    assert metadata.encoder_license == model.encoder.license != ""
    assert metadata.reference_sha256 == tuple(compute_sha256(path) for path in pair)


def test_from_pretrained_refuses_another_class(bundle: Any, lora_diffusion_dir: Path) -> None:
    config = json.loads((lora_diffusion_dir / "config.json").read_text())
    assert config["_class_name"] == "LoraDiffusion"
    with pytest.raises(ModelLoadError, match="class LoraDiffusion, ImageToLora was expected"):
        ImageToLora.from_pretrained(lora_diffusion_dir)
    with pytest.raises(ModelLoadError, match="class PairToLora, LoraDiffusion was expected"):
        LoraDiffusion.from_pretrained(bundle.pair_model)


def test_model_card_inverts_to_dict() -> None:
    card = ModelCard(license="mit", resolution=64, scenes=("red", "blue"), guidance_scale=2.0)
    assert ModelCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    with pytest.raises(InvalidArgumentError, match="unknown field 'steps' of a model card"):
        ModelCard.from_dict({"steps": 4})


def test_share_weights_loads_component_from_model_beside(bundle: Any, tmp_path: Path) -> None:
    photo = bundle.photo
    for name in ("source", "sharing"):
        shutil.copytree(bundle.model, tmp_path / name)
    expected = ImageToLora.from_pretrained(tmp_path / "sharing")(photo).weights.flatten()
    size = (tmp_path / "sharing" / "model.safetensors").stat().st_size
    saved_bytes = share_weights(tmp_path / "sharing", "encoder", "source")
    assert size - (tmp_path / "sharing" / "model.safetensors").stat().st_size >= saved_bytes > 0
    model = ImageToLora.from_pretrained(tmp_path / "sharing")
    assert torch.equal(model(photo).weights.flatten(), expected)
    model.save_pretrained(tmp_path / "elsewhere" / "whole")  # complete again
    whole_model = ImageToLora.from_pretrained(tmp_path / "elsewhere" / "whole")
    assert torch.equal(whole_model(photo).weights.flatten(), expected)
    (tmp_path / "source" / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="shares its encoder"):
        ImageToLora.from_pretrained(tmp_path / "sharing")


def test_share_weights_refuses_other_weights(bundle: Any, tmp_path: Path) -> None:
    for name in ("source", "sharing"):
        shutil.copytree(bundle.model, tmp_path / name)
    model = ImageToLora.from_pretrained(tmp_path / "source")
    next(model.encoder.parameters()).data.add_(1)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(InvalidArgumentError, match="is not that of source"):
        share_weights(tmp_path / "sharing", "encoder", "source")
