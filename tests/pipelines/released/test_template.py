"""A template as a model from photos: consent, LoRA, negative LoRA, card."""

import hashlib
from pathlib import Path

import pytest
import torch

from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.pipelines.photo_model import SubjectPhotos
from hyperlora.pipelines.released import template_sandbox
from hyperlora.pipelines.released.registry import open_released_model
from hyperlora.pipelines.released.released_model import ReleasedOptions
from hyperlora.pipelines.released.template import TemplateModel, make_template_card
from tests.pipelines.released.tiny_template import IMAGES, WEIGHT, make_template


def test_template_is_a_model_like_others(tmp_path: Path) -> None:
    folder = make_template(tmp_path / "ZImage-i2L-v2")
    with pytest.raises(ModelLoadError, match="--trust-remote-code"):
        open_released_model(str(folder))
    digest = hashlib.sha256((folder / "model.py").read_bytes()).hexdigest()
    model = open_released_model(str(folder), ReleasedOptions(trust_remote_code=digest[:16]))
    assert isinstance(model, TemplateModel) and model.digest == digest

    lora = model(IMAGES)
    (name,) = [target.name for target in lora.weights.layout.targets]
    assert name == "transformer.layers.0.attention.to_q"
    code = WEIGHT @ (torch.tensor([0.6, 0.0, 0.6]) + 0.25)
    torch.testing.assert_close(lora.weights.get_delta_weights()[0], torch.outer(code, code))
    assert lora.weights.layout.base == "Tongyi-MAI/Z-Image"
    assert lora.metadata.architecture == "z-image"
    assert lora.metadata.extra["hyperlora.negative_lora"] == "gray"
    assert lora.metadata.extra["hyperlora.commercial_use"] == "unknown"

    features = model.encode_subjects([SubjectPhotos(images=tuple(IMAGES))])
    negative = model.generate_negative(features)
    gray = WEIGHT @ (torch.tensor([128 / 255] * 3) + 0.25)
    torch.testing.assert_close(negative[0].get_delta_weights()[0], torch.outer(gray, gray))


def test_runs_go_to_the_process_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_template(tmp_path / "mine")
    model = TemplateModel("mine", folder, template_sandbox.compute_code_digest(folder))
    with pytest.raises(InvalidArgumentError, match="at least one image"):
        model.encode_subjects([SubjectPhotos()])
    fingerprint = model.compute_fingerprint()
    (folder / "model.safetensors").write_bytes(b"other")
    assert model.compute_fingerprint() != fingerprint


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("DiffSynth-Studio/ZImage-i2L-v2", "Tongyi-MAI/Z-Image"),
        ("DiffSynth-Studio/KleinBase4B-i2L-v2", "black-forest-labs/FLUX.2-klein-base-4B"),
        ("somebody/Template-Klein-Base-4B-ContentRef", "black-forest-labs/FLUX.2-klein-base-4B"),
        ("DiffSynth-Studio/HidreamO1-i2L-v2", "HiDream-ai/HiDream-O1"),
        ("somebody/other", "unknown"),
    ],
)
def test_base_follows_from_the_name(name: str, base: str) -> None:
    card = make_template_card(name)
    assert card.base == base and card.is_commercial is None
    assert card.purpose.startswith("content" if "ContentRef" in name else "style")
