"""Photos unlike the training pictures are told, and those like them are not."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hyperlora import pretrained as avatars
from hyperlora.cli import app
from hyperlora.data.images import read_image, to_tensor
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.encoders.ood_detector import OOD_DETECTOR_FILE, OodDetector, pool_features
from hyperlora.encoders.sidecar import compute_encoder_fingerprint
from hyperlora.errors import ModelLoadError
from hyperlora.features import ImageFeatures
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.input_checks import check_photos

WIDTH = 24


def gaussian(n: int, seed: int) -> torch.Tensor:
    """Vectors that vary along few directions."""
    spread = torch.linspace(3, 0.01, WIDTH)
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed)) * spread + 1


@pytest.fixture
def domain() -> OodDetector:
    return OodDetector.fit(
        gaussian(500, 0), gaussian(400, 1), "gradients", "none", num_components=8
    )


def test_the_distance_is_mahalanobis(domain: OodDetector) -> None:
    vectors, training = gaussian(20, 2), gaussian(500, 0)
    _, full = np.linalg.eigh(np.cov(training.T.numpy(), bias=True))
    axes = torch.from_numpy(full[:, ::-1].copy()).float()
    variances = ((training - training.mean(0)) @ axes).square().mean(0)
    variances[8:] = variances[8:].mean()
    expected = (((vectors - training.mean(0)) @ axes).square() / variances).sum(-1)
    torch.testing.assert_close(domain.compute_distances(vectors), expected, rtol=0.02, atol=0.05)


def test_the_threshold_passes_what_it_should(domain: OodDetector) -> None:
    assert (
        domain.compute_distances(gaussian(400, 1)) <= domain.threshold
    ).float().mean() == pytest.approx(0.995, abs=0.003)
    assert (domain.compute_distances(gaussian(1000, 3)) <= domain.threshold).float().mean() > 0.97
    assert (domain.compute_distances(gaussian(100, 4) - 4) > domain.threshold).float().mean() > 0.9


def test_saved_and_loaded_it_is_the_same(bundle: Any, tmp_path: Path) -> None:
    model = ImageToLora.from_pretrained(bundle.model)
    assert model.ood_detector is None and check_photos(
        None, model.encode_photos(torch.zeros(2, 1, 3, 16, 16))
    ) == [
        (),
        (),
    ]
    seen = pool_features(model.encode_photos(torch.rand(60, 1, 3, 16, 16)))[:, 0]
    model.ood_detector = OodDetector.fit(
        seen, seen, "noise", compute_encoder_fingerprint(model.encoder)
    )
    model.save_pretrained(tmp_path)
    again = ImageToLora.from_pretrained(tmp_path)
    assert again.ood_detector is not None
    torch.testing.assert_close(
        again.ood_detector.compute_distances(seen), model.ood_detector.compute_distances(seen)
    )

    model.encoder.backbone.norm.weight.data += 1
    with pytest.raises(ModelLoadError, match="another photo encoder"):
        OodDetector.load(tmp_path, model.encoder)
    (tmp_path / OOD_DETECTOR_FILE).write_bytes(b"no tensors")
    with pytest.raises(ModelLoadError, match="damaged"):
        ImageToLora.from_pretrained(tmp_path)


def test_sentences_count_the_photos() -> None:
    known, odd, axis = torch.eye(4)[:3]
    domain = OodDetector(known, axis[:, None], torch.ones(1), 0.01, 1.0, "gradients", "")
    tokens = torch.stack(
        [torch.stack(views) for views in ([known, known], [known, odd], [odd, odd])]
    )
    said = [
        " ".join(notices) for notices in check_photos(domain, ImageFeatures(tokens[:, :, None]))
    ]
    assert said[0] == ""
    assert said[1].startswith("1 of 2 photos do not look like the gradients this model knows")
    assert said[2].startswith("these photos do not look like") and said[2].endswith(
        "the nearest it can make"
    )


@pytest.fixture(scope="module")
def model() -> ImageToLora:
    return ImageToLora.from_pretrained(avatars.IMAGE_TO_LORA_DIR)


def test_the_bundle_tells_portraits_from_other_pictures(model: ImageToLora) -> None:
    assert model.ood_detector is not None
    people = sorted((avatars.BENCHMARK_DIR / "subjects").iterdir())[:24]
    portraits = [read_image(person / "0.webp") for person in people]
    random = np.random.default_rng(1)

    def tiles(cells: int, how: Any) -> Image.Image:
        return Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8)).resize(
            (128, 128), how
        )

    sharp, smooth = Image.Resampling.NEAREST, Image.Resampling.BILINEAR
    others = [
        tiles(n, how)
        for n, how in ((1, sharp), (2, smooth), (8, sharp), (128, sharp))
        for _ in range(3)
    ]
    found = [
        model.ood_detector.is_in_domain(
            model.encode_photos(torch.stack([to_tensor(p, 64) for p in pictures])[:, None])
        )
        for pictures in (portraits, others)
    ]
    assert found[0].float().mean() >= 0.95 and not found[1].any()


def test_generate_warns_and_still_writes(tmp_path: Path) -> None:
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "gradient.png")
    me = next((avatars.BENCHMARK_DIR / "subjects" / "person-1100002").glob("0.*"))
    out = str(tmp_path / "me.safetensors")
    told = CliRunner().invoke(app, ["generate", str(tmp_path / "gradient.png"), "-o", out])
    assert (told.exit_code, Path(out).is_file()) == (0, True)
    assert "warning: me: this photo does not look like the avatars this model knows" in told.stderr
    told = CliRunner().invoke(
        app, ["generate", str(tmp_path / "gradient.png"), "-o", out, "--json"]
    )
    assert "nearest it can make" in json.loads(told.stdout)["notices"][0]
    assert "warning" not in CliRunner().invoke(app, ["generate", str(me), "-o", out]).stderr


def test_what_is_known_is_measured_on_training_and_validation_people(
    bundle: Any, tmp_path: Path
) -> None:
    from data_builder.release.calibration import calibrate_identity_scale, fit_ood_detector
    from hyperlora.errors import InvalidArgumentError

    random = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "images.npy", random.integers(0, 256, (40, 16, 16, 3), np.uint8))
        plan = {"split": split, "people": 20, "each": 2, "size": 16}
        (tmp_path / split / "plan.json").write_text(json.dumps(plan))
    shutil.copytree(bundle.model, tmp_path / "model")
    shutil.copytree(bundle.evaluator, tmp_path / "evaluator")
    farthest = fit_ood_detector(
        tmp_path / "model", tmp_path / "train", tmp_path / "validation", "noise"
    )
    domain = ImageToLora.from_pretrained(tmp_path / "model").ood_detector
    assert domain is not None and (domain.threshold, domain.domain_name) == (farthest, "noise")
    scale = calibrate_identity_scale(tmp_path / "evaluator", tmp_path / "validation")
    assert (
        tuple(AttributeClassifier.from_pretrained(tmp_path / "evaluator").identity_scale or ())
        == scale
    )
    for wrong in (
        lambda: fit_ood_detector(tmp_path / "model", tmp_path / "train", tmp_path / "test", "x"),
        lambda: calibrate_identity_scale(tmp_path / "evaluator", tmp_path / "test"),
    ):
        with pytest.raises(InvalidArgumentError):
            wrong()
