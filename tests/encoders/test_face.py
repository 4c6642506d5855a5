"""insightface with a pack of tiny ONNX models: red squares are large faces, green ones small."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from typer.testing import CliRunner

from data_builder.build.plan import read_plan
from data_builder.cli import app
from data_builder.sources.crops import crop_image
from hyperlora.encoders.face_analysis import UNKNOWN_LICENSE, FaceAnalyzer
from hyperlora.errors import InvalidImageError, ModelLoadError

pytest.importorskip("insightface")
KEYPOINTS = ((-0.4, -0.4), (0.4, -0.4), (0.0, 0.0), (-0.3, 0.45), (0.3, 0.45))


class SquareDetector(nn.Module):
    """SCRFD's nine outputs: scores, boxes, keypoints at strides 8, 16, 32, two anchors each."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        scores, boxes, keypoints = [], [], []
        for stride, channel, half_side in ((8, 1, 2.5), (16, None, 1.0), (32, 0, 1.5)):
            grid = nn.functional.avg_pool2d(x, stride)
            background = grid[:, 1 - channel] if channel is not None else grid[:, 0]
            signal = grid[:, channel] - background if channel is not None else grid[:, 0] * 0 - 9
            score = torch.sigmoid(8 * (signal - 1.0)).reshape(-1, 1)
            scores.append(torch.stack([score, score * 0], 1).reshape(-1, 1))
            boxes.append(torch.ones_like(scores[-1]).repeat(1, 4) * half_side)
            keypoints.append(
                torch.ones_like(scores[-1]) * torch.tensor(KEYPOINTS).reshape(1, 10) * half_side
            )
        return (*scores, *boxes, *keypoints)


def export_onnx(network: nn.Module, size: int, file: Path, num_outputs: int) -> None:
    names = [f"out{i}" for i in range(num_outputs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (torch.zeros(1, 3, size, size),),
            str(file),
            dynamo=False,
            opset_version=17,
            input_names=["in"],
            output_names=names,
        )


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    torch.manual_seed(0)
    export_onnx(SquareDetector(), 640, folder / "det_tiny.onnx", 9)
    recognizer = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(3 * 49, 512, bias=False))
    export_onnx(recognizer, 112, folder / "rec_tiny.onnx", 1)
    (folder / "MODEL.LICENSE").write_text("CC0-1.0\nfor tests\n")
    digests = {
        n: hashlib.sha256((folder / n).read_bytes()).hexdigest()
        for n in ("det_tiny.onnx", "rec_tiny.onnx")
    }
    tasks = {
        "detection": {"file": "det_tiny.onnx", "sha256": digests["det_tiny.onnx"]},
        "recognition": {"file": "rec_tiny.onnx", "sha256": digests["rec_tiny.onnx"]},
    }
    manifest = {
        "manifest_version": 2,
        "model_id": "tiny",
        "tasks": tasks,
        "license": "MODEL.LICENSE",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def make_photo(large: bool = True, small: bool = False) -> Image.Image:
    image = Image.new("RGB", (640, 640), "black")
    draw = ImageDraw.Draw(image)
    if large:
        draw.rectangle(
            (320, 256, 351, 287), fill="red"
        )  # one cell of stride 32, its anchor at (320, 256)
    if small:
        draw.rectangle((80, 400, 87, 407), fill=(0, 255, 0))  # one cell of stride 8
    return image


def test_detect_faces_sorts_by_size_and_aligned_crop_box_holds_the_face(pack: Path) -> None:
    analyzer = FaceAnalyzer(pack)
    assert analyzer.license == "CC0-1.0"
    faces = analyzer.detect_faces(make_photo(small=True))
    assert [round(face.area**0.5) for face in faces] == [96, 40]
    assert faces[0].box == pytest.approx((272, 208, 368, 304), abs=1)
    assert faces[0].embedding is not None and np.linalg.norm(faces[0].embedding) == pytest.approx(
        1, abs=1e-3
    )
    x, y, side, angle = faces[0].compute_aligned_crop_box(1.0)
    assert abs(x - 320) < 8 and 230 < y < 250 and 100 < side < 140 and abs(angle) < 1
    red = np.asarray(crop_image(make_photo(), faces[0].compute_aligned_crop_box(1.0), 32)).reshape(
        -1, 3
    )
    assert (red[:, 0] > 128).mean() > 0.05, "the square holds the face"


def test_aligned_crop_box_makes_a_rotated_face_upright(pack: Path) -> None:
    from dataclasses import replace

    face = FaceAnalyzer(pack).get_face(make_photo())
    angle = np.deg2rad(20)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    center = np.array([320.0, 256.0])
    rotated = replace(face, keypoints=(face.keypoints - center) @ rotation.T + center)
    eyes = Image.new("RGB", (640, 640), "black")
    for point in rotated.keypoints[:2]:
        ImageDraw.Draw(eyes).ellipse((*(point - 4), *(point + 4)), fill="white")
    upright = (
        np.asarray(crop_image(eyes, rotated.compute_aligned_crop_box(1.2), 128).convert("L")) > 128
    )
    rows, columns = np.nonzero(upright)
    left, right = rows[columns < 64].mean(), rows[columns >= 64].mean()
    assert abs(left - right) < 2, "the eyes are level"


def test_get_face_names_the_missing_face(pack: Path) -> None:
    analyzer = FaceAnalyzer(pack)
    with pytest.raises(InvalidImageError, match="no face was found"):
        analyzer.get_face(make_photo(large=False))
    with pytest.raises(InvalidImageError, match="face 1 was asked for, there are 1"):
        analyzer.get_face(make_photo(), 1)


def test_face_analyzer_refuses_bad_packs(pack: Path, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(ModelLoadError, match="there is no face pack 'antelope9'"):
        FaceAnalyzer("antelope9")
    with pytest.raises(ModelLoadError, match="holds no ONNX model"):
        FaceAnalyzer(tmp_path)
    tampered_pack = shutil.copytree(pack, tmp_path / "tampered")
    with (tampered_pack / "det_tiny.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelLoadError, match=r"tampered with .*SHA-256 mismatch"):
        FaceAnalyzer(tampered_pack)
    half_pack = shutil.copytree(pack, tmp_path / "half")
    for name in ("det_tiny.onnx", "manifest.json"):
        (half_pack / name).unlink()
    with pytest.raises(ModelLoadError, match="has no detector"):
        FaceAnalyzer(half_pack)
    bare_pack = shutil.copytree(pack, tmp_path / "bare")
    (bare_pack / "manifest.json").unlink()
    assert FaceAnalyzer(bare_pack).license == UNKNOWN_LICENSE


def test_plan_crops_to_faces_and_skips_photos_without_face(
    pack: Path, bundle: Any, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, image in (
        ("one", make_photo()),
        ("two", make_photo(small=True)),
        ("none", make_photo(large=False)),
    ):
        image.save(photos / f"{name}.png")
    out = tmp_path / "build"
    arguments = [
        "plan",
        photos,
        "-o",
        out,
        "--base",
        bundle.base,
        "--crop",
        "face",
        "--face-pack",
        pack,
    ]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    plan = read_plan(out)
    assert [row.subject for row in plan.rows] == ["one", "two"]
    assert plan.rows[0].photos[0].crop_box == pytest.approx(plan.rows[1].photos[0].crop_box, abs=1)
    assert (
        "none, none.png: no face was found" in result.stderr
        and "two, two.png: 2 faces, the largest" in result.stderr
    )
    assert plan.metadata == {"crop": "face", "face_pack": pack.name, "face_license": "CC0-1.0"}
    second_result = CliRunner().invoke(
        app,
        [
            *map(str, arguments[:3]),
            str(tmp_path / "second"),
            *map(str, arguments[4:]),
            "--face-index",
            "1",
        ],
    )
    assert second_result.exit_code == 0 and [
        r.subject for r in read_plan(tmp_path / "second").rows
    ] == ["two"]
    refused_result = CliRunner().invoke(app, list(map(str, arguments[:-2])))
    assert refused_result.exit_code == 2 and "--face-pack" in refused_result.stderr
