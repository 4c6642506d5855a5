"""``OodDetector``: photos unlike the training images are detected, others are not."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hyperlora import pretrained
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


def sample_features(n: int, seed: int) -> torch.Tensor:
    """Vectors that vary along few directions."""
    std = torch.linspace(3, 0.01, WIDTH)
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed)) * std + 1


@pytest.fixture
def detector() -> OodDetector:
    return OodDetector.fit(
        sample_features(500, 0), sample_features(400, 1), "gradients", "none", num_components=8
    )


def test_compute_distances_equals_mahalanobis(detector: OodDetector) -> None:
    features, train_features = sample_features(20, 2), sample_features(500, 0)
    _, eigenvectors = np.linalg.eigh(np.cov(train_features.T.numpy(), bias=True))
    components = torch.from_numpy(eigenvectors[:, ::-1].copy()).float()
    variances = ((train_features - train_features.mean(0)) @ components).square().mean(0)
    variances[8:] = variances[8:].mean()
    projections = (features - train_features.mean(0)) @ components
    expected = (projections.square() / variances).sum(-1)
    torch.testing.assert_close(detector.compute_distances(features), expected, rtol=0.02, atol=0.05)


def test_threshold_passes_the_pass_rate(detector: OodDetector) -> None:
    assert (
        detector.compute_distances(sample_features(400, 1)) <= detector.threshold
    ).float().mean() == pytest.approx(0.995, abs=0.003)
    assert (
        detector.compute_distances(sample_features(1000, 3)) <= detector.threshold
    ).float().mean() > 0.97
    assert (
        detector.compute_distances(sample_features(100, 4) - 4) > detector.threshold
    ).float().mean() > 0.9


def test_load_restores_what_save_wrote(bundle: Any, tmp_path: Path) -> None:
    model = ImageToLora.from_pretrained(bundle.model)
    assert model.ood_detector is None and check_photos(
        None, model.encode_photos(torch.zeros(2, 1, 3, 16, 16)).image
    ) == [
        (),
        (),
    ]
    features = pool_features(model.encode_photos(torch.rand(60, 1, 3, 16, 16)).image)[:, 0]
    model.ood_detector = OodDetector.fit(
        features, features, "noise", compute_encoder_fingerprint(model.encoder)
    )
    model.save_pretrained(tmp_path)
    restored = ImageToLora.from_pretrained(tmp_path)
    assert restored.ood_detector is not None
    torch.testing.assert_close(
        restored.ood_detector.compute_distances(features),
        model.ood_detector.compute_distances(features),
    )

    model.encoder.backbone.norm.weight.data += 1
    with pytest.raises(ModelLoadError, match="another photo encoder"):
        OodDetector.load(tmp_path, model.encoder)
    (tmp_path / OOD_DETECTOR_FILE).write_bytes(b"no tensors")
    with pytest.raises(ModelLoadError, match="damaged"):
        ImageToLora.from_pretrained(tmp_path)


def test_check_photos_counts_photos_outside_the_domain() -> None:
    known, odd, component = torch.eye(4)[:3]
    detector = OodDetector(known, component[:, None], torch.ones(1), 0.01, 1.0, "gradients", "")
    tokens = torch.stack(
        [torch.stack(views) for views in ([known, known], [known, odd], [odd, odd])]
    )
    warnings = [
        " ".join(sentences)
        for sentences in check_photos(detector, ImageFeatures(tokens[:, :, None]))
    ]
    assert warnings[0] == ""
    assert warnings[1].startswith("1 of 2 photos do not look like the gradients this model knows")
    assert warnings[2].startswith("these photos do not look like") and warnings[2].endswith(
        "the nearest it can make"
    )


@pytest.fixture(scope="module")
def model() -> ImageToLora:
    return ImageToLora.from_pretrained(pretrained.IMAGE_TO_LORA_DIR)


def test_bundled_detector_separates_portraits_from_other_images(model: ImageToLora) -> None:
    assert model.ood_detector is not None
    subject_dirs = sorted((pretrained.BENCHMARK_DIR / "subjects").iterdir())[:24]
    portraits = [read_image(subject_dir / "0.webp") for subject_dir in subject_dirs]
    random = np.random.default_rng(1)

    def make_tiles(num_cells: int, resample: Any) -> Image.Image:
        return Image.fromarray(random.integers(0, 256, (num_cells, num_cells, 3), np.uint8)).resize(
            (128, 128), resample
        )

    sharp, smooth = Image.Resampling.NEAREST, Image.Resampling.BILINEAR
    other_images = [
        make_tiles(n, resample)
        for n, resample in ((1, sharp), (2, smooth), (8, sharp), (128, sharp))
        for _ in range(3)
    ]
    in_domain = [
        model.ood_detector.is_in_domain(
            model.encode_photos(
                torch.stack([to_tensor(image, 64) for image in images])[:, None]
            ).image
        )
        for images in (portraits, other_images)
    ]
    assert in_domain[0].float().mean() >= 0.95 and not in_domain[1].any()


def test_generate_warns_of_unknown_photos_and_still_writes(tmp_path: Path) -> None:
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "gradient.png")
    photo = next((pretrained.BENCHMARK_DIR / "subjects" / "person-1100002").glob("0.*"))
    output = str(tmp_path / "me.safetensors")
    result = CliRunner().invoke(app, ["generate", str(tmp_path / "gradient.png"), "-o", output])
    assert (result.exit_code, Path(output).is_file()) == (0, True)
    assert (
        "warning: me: this photo does not look like the avatars this model knows" in result.stderr
    )
    result = CliRunner().invoke(
        app, ["generate", str(tmp_path / "gradient.png"), "-o", output, "--json"]
    )
    assert "nearest it can make" in json.loads(result.stdout)["warnings"][0]
    assert "warning" not in CliRunner().invoke(app, ["generate", str(photo), "-o", output]).stderr


def test_fit_ood_detector_uses_train_and_validation_subjects(bundle: Any, tmp_path: Path) -> None:
    from data_builder.release.calibration import calibrate_identity_scale, fit_ood_detector
    from hyperlora.errors import InvalidArgumentError

    random = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "images.npy", random.integers(0, 256, (40, 16, 16, 3), np.uint8))
        plan = {"split": split, "num_identities": 20, "portraits_per_identity": 2, "size": 16}
        (tmp_path / split / "plan.json").write_text(json.dumps(plan))
    shutil.copytree(bundle.model, tmp_path / "model")
    shutil.copytree(bundle.evaluator, tmp_path / "evaluator")
    threshold = fit_ood_detector(
        tmp_path / "model", tmp_path / "train", tmp_path / "validation", "noise"
    )
    detector = ImageToLora.from_pretrained(tmp_path / "model").ood_detector
    assert detector is not None
    assert (detector.threshold, detector.domain_name) == (threshold, "noise")
    scale = calibrate_identity_scale(tmp_path / "evaluator", tmp_path / "validation")
    assert (
        tuple(AttributeClassifier.from_pretrained(tmp_path / "evaluator").identity_scale or ())
        == scale
    )
    for call in (
        lambda: fit_ood_detector(tmp_path / "model", tmp_path / "train", tmp_path / "test", "x"),
        lambda: calibrate_identity_scale(tmp_path / "evaluator", tmp_path / "test"),
    ):
        with pytest.raises(InvalidArgumentError):
            call()
