"""The bundle's face pack on drawn people that its training never saw; and how such a pack is made."""

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
from hyperlora import pretrained as released
from hyperlora.encoders.face_analysis import FaceAnalyzer
from hyperlora.encoders.face_networks import FaceDetector, FaceRecognizer
from hyperlora.errors import InvalidImageError, ModelLoadError
from hyperlora.training.modules.face import AMBIGUOUS, FACE, AnchorTargets

PEOPLE = SPLITS["validation"][:12]


@pytest.fixture(scope="module")
def finder() -> FaceAnalyzer:
    return FaceAnalyzer(released.FACE_PACK_DIR, 128)


def test_the_bundles_pack_is_small_and_its_licence_is_known(finder: FaceAnalyzer) -> None:
    assert finder.license == "Apache-2.0"
    assert sum(file.stat().st_size for file in released.FACE_PACK_DIR.iterdir()) < 1.2e6


@pytest.mark.parametrize("size", [128, 320, 640])
def test_finds_the_face_of_a_portrait_and_its_keypoints(size: int) -> None:
    finder, off = FaceAnalyzer(released.FACE_PACK_DIR, size), []
    for seed in PEOPLE[:6]:
        who, how = sample_identity(seed), sample_scene(seed, 0)
        (face,) = finder.detect_faces(render_portrait(who, how))
        truth = compute_landmarks(who, how)
        off.append(np.linalg.norm(face.keypoints - truth.keypoints, axis=1))
        assert face.box == pytest.approx(truth.box, abs=12)
    assert np.mean(off) < 3.5 and np.mean(off, 0).max() < 6, "pixels, of 128"


def test_of_two_people_the_larger_face_comes_first() -> None:
    large, small = (render_portrait(sample_identity(seed), Scene()) for seed in PEOPLE[:2])
    picture = Image.new("RGB", (320, 256), "#6FC36B")
    picture.paste(large.resize((200, 200)), (0, 56))
    picture.paste(small.resize((110, 110)), (210, 10))
    first, second = FaceAnalyzer(released.FACE_PACK_DIR, 320).detect_faces(picture)
    assert first.area > 2 * second.area
    assert (
        np.abs(
            first.keypoints
            - compute_landmarks(sample_identity(PEOPLE[0]), Scene(), 200).keypoints
            - (0, 56)
        ).max()
        < 8
    )
    assert (
        np.abs(
            second.keypoints
            - compute_landmarks(sample_identity(PEOPLE[1]), Scene(), 110).keypoints
            - (210, 10)
        ).max()
        < 8
    )


def test_finds_nobody_where_nobody_is(finder: FaceAnalyzer) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    for picture in (
        Image.new("RGB", (128, 128), "white"),
        Image.new("RGB", (90, 128)),
        Image.fromarray(noise),
    ):
        with pytest.raises(InvalidImageError, match="no face was found"):
            finder.get_face(picture)


def test_tells_people_apart_whatever_they_wear(finder: FaceAnalyzer) -> None:
    plain = Scene("smiling", "open", "none", "hoodie", "red", "sky")
    other = Scene("serious", "closed", "glasses", "tuxedo", "black", "orange", roll=4, shift_x=5)
    one, two = (
        np.stack(
            [
                finder.get_face(render_portrait(sample_identity(seed), how)).embedding
                for seed in PEOPLE
            ]
        )
        for how in (plain, other)
    )
    cosines = one @ two.T
    same, different = np.diag(cosines), cosines[~np.eye(len(PEOPLE), dtype=bool)]
    assert same.mean() > different.mean() + 0.4
    assert (cosines.argmax(1) == np.arange(len(PEOPLE))).mean() > 0.8


def test_a_pack_that_was_changed_is_refused(tmp_path: Path) -> None:
    pack = shutil.copytree(released.FACE_PACK_DIR, tmp_path / "pack")
    with (pack / "rec_avatars.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelLoadError, match="SHA-256 mismatch"):
        FaceAnalyzer(pack)


def test_a_folder_of_portraits_is_cropped_to_faces(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in PEOPLE[:3]:
        render_portrait(sample_identity(seed), sample_scene(seed, 0)).save(photos / f"{seed}.png")
    Image.new("RGB", (128, 128), "gray").save(photos / "nobody.png")
    out = tmp_path / "build"
    arguments = ["plan", photos, "-o", out, "--crop", "face", "--face-pack", released.FACE_PACK_DIR]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    plan = read_plan(out)
    assert [row.subject for row in plan.rows] == [str(seed) for seed in PEOPLE[:3]]
    assert "nobody, nobody.png: no face was found" in done.stderr
    assert plan.metadata["face_licence"] == "Apache-2.0"
    for row in plan.rows:
        x, y, side, _ = row.photos[0].crop_box
        assert 45 < x < 83 and 40 < y < 90 and 90 < side < 170


def test_a_pack_says_what_its_networks_say(tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    detector, recogniser = (
        FaceDetector((4, 6, 8)),
        FaceRecognizer("resnet10t", 512, {"channels": [8, 8, 8, 8]}),
    )
    detector.save_pretrained(tmp_path / "detector")
    recogniser.save_pretrained(tmp_path / "recogniser")
    done = CliRunner().invoke(
        app,
        [
            "face-pack",
            str(tmp_path / "detector"),
            str(tmp_path / "recogniser"),
            "-o",
            str(tmp_path / "pack"),
        ],
    )
    assert done.exit_code == 0, done.output
    assert FaceAnalyzer(tmp_path / "pack", 128).detect_faces(Image.new("RGB", (64, 64))) == []
    for name, network, shape in (
        ("det_avatars", FaceDetector.from_pretrained(tmp_path / "detector"), (1, 3, 96, 160)),
        ("rec_avatars", FaceRecognizer.from_pretrained(tmp_path / "recogniser"), (2, 3, 112, 112)),
    ):
        pixels = torch.randn(shape)
        session = onnxruntime.InferenceSession(str(tmp_path / "pack" / f"{name}.onnx"))
        said, meant = session.run(None, {"in": pixels.numpy()}), network(pixels)
        for one, other in zip(said, meant if isinstance(meant, tuple) else (meant,), strict=True):
            np.testing.assert_allclose(one, other.numpy(), rtol=1e-3, atol=1e-4)
    with pytest.raises(ModelLoadError, match="holds no FaceDetector"):
        FaceDetector.from_pretrained(tmp_path / "recogniser")


def test_anchors_near_the_middle_of_a_face_are_to_find_it() -> None:
    face, points = torch.tensor([48.0, 40.0, 88.0, 80.0]), torch.arange(10.0).view(5, 2) + 60
    none = torch.zeros(4)
    batch = {
        "boxes": torch.stack(
            [torch.stack([face, none]), torch.stack([face, none]), torch.stack([none, none])]
        ),
        "keypoints": points.expand(3, 2, 5, 2),
        "kinds": torch.tensor([[FACE, 0], [AMBIGUOUS, 0], [0, 0]]),
    }
    wanted = AnchorTargets.from_batch(batch, torch.Size((16, 20)))
    assert wanted.positive_mask[0, :, :, 0].nonzero().tolist() == [
        [7, 8],
        [7, 9],
        [8, 8],
        [8, 9],
    ]  # 40 pixels: a small face
    assert not wanted.positive_mask[0, :, :, 1].any() and not wanted.positive_mask[1:].any()
    assert (
        not wanted.valid_mask[1, 8, 8].any()
        and wanted.valid_mask[2].all()
        and wanted.valid_mask[0, 0].all()
    )
    sides, keypoints = wanted.regression_targets[0, 7, 8, 0].split(
        [4, 10]
    )  # from (64, 56), in sides of 32 pixels
    torch.testing.assert_close(sides * 32, torch.tensor([16.0, 16.0, 24.0, 24.0]))
    torch.testing.assert_close(keypoints.view(5, 2) * 32 + torch.tensor([64.0, 56.0]), points)
    assert float(wanted.face_sizes[0, 7, 8, 0]) == pytest.approx(40 / 32)
