"""The bundled face pack on avatars unseen in training, and the export of such a pack."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("insightface")

from data_builder.avatars.identity import SPLITS, Scene, sample_identity, sample_scene
from data_builder.avatars.landmarks import compute_landmarks
from data_builder.avatars.rendering import render_portrait
from data_builder.build.plan import read_plan
from data_builder.cli import app
from hyperlora import pretrained
from hyperlora.encoders.face_analysis import FaceAnalyzer
from hyperlora.encoders.face_networks import FaceDetector, FaceRecognizer
from hyperlora.errors import InvalidImageError, ModelLoadError
from hyperlora.training.batches import FaceDetectionBatch
from hyperlora.training.modules.face import AMBIGUOUS, FACE, AnchorTargets

SUBJECTS = SPLITS["validation"][:12]


@pytest.fixture(scope="module")
def analyzer() -> FaceAnalyzer:
    return FaceAnalyzer(pretrained.FACE_PACK_DIR, 128)


def test_bundled_pack_is_small_and_has_a_license(analyzer: FaceAnalyzer) -> None:
    assert analyzer.license == "Apache-2.0"
    assert sum(file.stat().st_size for file in pretrained.FACE_PACK_DIR.iterdir()) < 1.2e6


@pytest.mark.parametrize("size", [128, 320, 640])
def test_detect_faces_finds_face_and_keypoints_of_portraits(size: int) -> None:
    analyzer, errors = FaceAnalyzer(pretrained.FACE_PACK_DIR, size), []
    for seed in SUBJECTS[:6]:
        identity, scene = sample_identity(seed), sample_scene(seed, 0)
        (face,) = analyzer.detect_faces(render_portrait(identity, scene))
        truth = compute_landmarks(identity, scene)
        errors.append(np.linalg.norm(face.keypoints - truth.keypoints, axis=1))
        assert face.box == pytest.approx(truth.box, abs=12)
    assert np.mean(errors) < 3.5 and np.mean(errors, 0).max() < 6, "pixels, of 128"


def test_detect_faces_returns_the_larger_face_first() -> None:
    large, small = (render_portrait(sample_identity(seed), Scene()) for seed in SUBJECTS[:2])
    image = Image.new("RGB", (320, 256), "#6FC36B")
    image.paste(large.resize((200, 200)), (0, 56))
    image.paste(small.resize((110, 110)), (210, 10))
    first, second = FaceAnalyzer(pretrained.FACE_PACK_DIR, 320).detect_faces(image)
    assert first.area > 2 * second.area
    assert (
        np.abs(
            first.keypoints
            - compute_landmarks(sample_identity(SUBJECTS[0]), Scene(), 200).keypoints
            - (0, 56)
        ).max()
        < 8
    )
    assert (
        np.abs(
            second.keypoints
            - compute_landmarks(sample_identity(SUBJECTS[1]), Scene(), 110).keypoints
            - (210, 10)
        ).max()
        < 8
    )


def test_get_face_refuses_images_without_face(analyzer: FaceAnalyzer) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    for image in (
        Image.new("RGB", (128, 128), "white"),
        Image.new("RGB", (90, 128)),
        Image.fromarray(noise),
    ):
        with pytest.raises(InvalidImageError, match="no face was found"):
            analyzer.get_face(image)


def test_embeddings_separate_identities_across_scenes(analyzer: FaceAnalyzer) -> None:
    first_scene = Scene("smiling", "open", "none", "hoodie", "red", "sky")
    second_scene = Scene(
        "serious", "closed", "glasses", "tuxedo", "black", "orange", roll=4, shift_x=5
    )
    first, second = (
        np.stack(
            [
                analyzer.get_face(render_portrait(sample_identity(seed), scene)).embedding
                for seed in SUBJECTS
            ]
        )
        for scene in (first_scene, second_scene)
    )
    cosines = first @ second.T
    same, different = np.diag(cosines), cosines[~np.eye(len(SUBJECTS), dtype=bool)]
    assert same.mean() > different.mean() + 0.4
    assert (cosines.argmax(1) == np.arange(len(SUBJECTS))).mean() > 0.8


def test_face_analyzer_refuses_a_modified_pack(tmp_path: Path) -> None:
    pack = shutil.copytree(pretrained.FACE_PACK_DIR, tmp_path / "pack")
    with (pack / "rec_avatars.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelLoadError, match="SHA-256 mismatch"):
        FaceAnalyzer(pack)


def test_plan_crops_portraits_to_faces(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in SUBJECTS[:3]:
        render_portrait(sample_identity(seed), sample_scene(seed, 0)).save(photos / f"{seed}.png")
    Image.new("RGB", (128, 128), "gray").save(photos / "nobody.png")
    out = tmp_path / "build"
    arguments = [
        "plan",
        photos,
        "-o",
        out,
        "--crop",
        "face",
        "--face-pack",
        pretrained.FACE_PACK_DIR,
    ]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    plan = read_plan(out)
    assert [row.subject for row in plan.rows] == [str(seed) for seed in SUBJECTS[:3]]
    assert "nobody, nobody.png: no face was found" in result.stderr
    assert plan.metadata["face_license"] == "Apache-2.0"
    for row in plan.rows:
        x, y, side, _ = row.photos[0].crop_box
        assert 45 < x < 83 and 40 < y < 90 and 90 < side < 170


def test_exported_pack_equals_its_networks(tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    detector, recognizer = (
        FaceDetector((4, 6, 8)),
        FaceRecognizer("resnet10t", 512, {"channels": [8, 8, 8, 8]}),
    )
    detector.save_pretrained(tmp_path / "detector")
    recognizer.save_pretrained(tmp_path / "recognizer")
    result = CliRunner().invoke(
        app,
        [
            "export-face-pack",
            str(tmp_path / "detector"),
            str(tmp_path / "recognizer"),
            "-o",
            str(tmp_path / "pack"),
        ],
    )
    assert result.exit_code == 0, result.output
    assert FaceAnalyzer(tmp_path / "pack", 128).detect_faces(Image.new("RGB", (64, 64))) == []
    for name, network, shape in (
        ("det_avatars", FaceDetector.from_pretrained(tmp_path / "detector"), (1, 3, 96, 160)),
        ("rec_avatars", FaceRecognizer.from_pretrained(tmp_path / "recognizer"), (2, 3, 112, 112)),
    ):
        pixels = torch.randn(shape)
        session = onnxruntime.InferenceSession(str(tmp_path / "pack" / f"{name}.onnx"))
        outputs, expected = session.run(None, {"in": pixels.numpy()}), network(pixels)
        expected_outputs = expected if isinstance(expected, tuple) else (expected,)
        for output, expected_output in zip(outputs, expected_outputs, strict=True):
            np.testing.assert_allclose(output, expected_output.numpy(), rtol=1e-3, atol=1e-4)
    with pytest.raises(ModelLoadError, match="holds no FaceDetector"):
        FaceDetector.from_pretrained(tmp_path / "recognizer")


def test_anchor_targets_are_positive_near_the_center_of_a_face() -> None:
    face, points = torch.tensor([48.0, 40.0, 88.0, 80.0]), torch.arange(10.0).view(5, 2) + 60
    no_face = torch.zeros(4)
    batch = FaceDetectionBatch(
        images=torch.zeros(3, 3, 128, 160),
        boxes=torch.stack(
            [
                torch.stack([face, no_face]),
                torch.stack([face, no_face]),
                torch.stack([no_face, no_face]),
            ]
        ),
        keypoints=points.expand(3, 2, 5, 2),
        face_kinds=torch.tensor([[FACE, 0], [AMBIGUOUS, 0], [0, 0]]),
    )
    targets = AnchorTargets.from_batch(batch, torch.Size((16, 20)))
    assert targets.positive_mask[0, :, :, 0].nonzero().tolist() == [
        [7, 8],
        [7, 9],
        [8, 8],
        [8, 9],
    ]  # 40 pixels: a small face
    assert not targets.positive_mask[0, :, :, 1].any() and not targets.positive_mask[1:].any()
    assert (
        not targets.valid_mask[1, 8, 8].any()
        and targets.valid_mask[2].all()
        and targets.valid_mask[0, 0].all()
    )
    sides, keypoints = targets.regression_targets[0, 7, 8, 0].split(
        [4, 10]
    )  # from (64, 56), in sides of 32 pixels
    torch.testing.assert_close(sides * 32, torch.tensor([16.0, 16.0, 24.0, 24.0]))
    torch.testing.assert_close(keypoints.view(5, 2) * 32 + torch.tensor([64.0, 56.0]), points)
    assert float(targets.face_sizes[0, 7, 8, 0]) == pytest.approx(40 / 32)
