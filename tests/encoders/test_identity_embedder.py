"""Identity embedders: saved with a model, bound to its encoder, exported from a classifier."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from data_builder.cli import app
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.encoders.identity_embedder import IDENTITY_EMBEDDER_FILE, IdentityEmbedder
from hyperlora.errors import ModelLoadError
from hyperlora.pipelines.image_to_lora import ImageToLora


@pytest.fixture
def model(bundle: Any) -> ImageToLora:
    model = ImageToLora.from_pretrained(bundle.model)
    torch.manual_seed(1)
    width = model.encoder.width
    model.identity_embedder = IdentityEmbedder(
        model.encoder, torch.randn(8, width) * width**-0.5, torch.zeros(8)
    )
    return model


def test_identity_embedder_survives_saving(model: ImageToLora, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded_model = ImageToLora.from_pretrained(tmp_path)
    assert model.identity_embedder is not None and loaded_model.identity_embedder is not None
    images = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(
        loaded_model.identity_embedder(images),
        model.identity_embedder(images),
        atol=1e-2,
        rtol=1e-2,
    )
    (tmp_path / IDENTITY_EMBEDDER_FILE).unlink()
    assert ImageToLora.from_pretrained(tmp_path).identity_embedder is None


def test_load_refuses_other_encoder_and_damaged_file(model: ImageToLora, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert model.identity_embedder is not None
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1.0)
    model.identity_embedder.save(tmp_path)
    with pytest.raises(
        ModelLoadError, match=r"another photo encoder.*data_builder export-identity"
    ):
        ImageToLora.from_pretrained(tmp_path)
    (tmp_path / IDENTITY_EMBEDDER_FILE).write_bytes(b"nothing")
    with pytest.raises(ModelLoadError, match="damaged"):
        ImageToLora.from_pretrained(tmp_path)


def test_export_identity_needs_classifier_of_the_encoder(bundle: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = ImageToLora.from_pretrained(bundle.model)
    config = model.encoder.config
    classifier = AttributeClassifier(
        config["name"], config["image_size"], {"hair": ("bob", "afro")}, options=config["options"]
    )
    model.save_pretrained(tmp_path / "model")
    classifier.save_pretrained(tmp_path / "other")
    classifier.encoder.load_state_dict(model.encoder.state_dict())
    classifier.save_pretrained(tmp_path / "classifier")
    model_dir = str(tmp_path / "model")
    result = CliRunner().invoke(
        app, ["export-identity", str(tmp_path / "classifier"), "--model", model_dir]
    )
    assert result.exit_code == 0 and "width 64" in result.output
    assert ImageToLora.from_pretrained(model_dir).identity_embedder is not None
    result = CliRunner().invoke(
        app, ["export-identity", str(tmp_path / "other"), "--model", model_dir]
    )
    assert result.exit_code == 2
    assert "give the classifier that it was taken from" in " ".join(result.output.split())
