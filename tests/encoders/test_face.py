"""Faces through insightface, on a pack of tiny ONNX models: red squares are large faces, green ones small faces."""

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


class Detector(nn.Module):
    """SCRFD's nine outputs: scores, boxes and keypoints at strides 8, 16 and 32, two anchors each."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        scores, boxes, points = [], [], []
        for stride, channel, reach in ((8, 1, 2.5), (16, None, 1.0), (32, 0, 1.5)):
            grid = nn.functional.avg_pool2d(x, stride)
            other = grid[:, 1 - channel] if channel is not None else grid[:, 0]
            seen = grid[:, channel] - other if channel is not None else grid[:, 0] * 0 - 9
            first = torch.sigmoid(8 * (seen - 1.0)).reshape(-1, 1)
            scores.append(torch.stack([first, first * 0], 1).reshape(-1, 1))
            boxes.append(torch.ones_like(scores[-1]).repeat(1, 4) * reach)
            points.append(
                torch.ones_like(scores[-1]) * torch.tensor(KEYPOINTS).reshape(1, 10) * reach
            )
        return (*scores, *boxes, *points)


def export(net: nn.Module, size: int, file: Path, outputs: int) -> None:
    names = [f"out{i}" for i in range(outputs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.eval(),
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
    export(Detector(), 640, folder / "det_tiny.onnx", 9)
    recogniser = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(3 * 49, 512, bias=False))
    export(recogniser, 112, folder / "rec_tiny.onnx", 1)
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


def photo(large: bool = True, small: bool = False) -> Image.Image:
    image = Image.new("RGB", (640, 640), "black")
    draw = ImageDraw.Draw(image)
    if large:
        draw.rectangle(
            (320, 256, 351, 287), fill="red"
        )  # one cell of stride 32, its anchor at (320, 256)
    if small:
        draw.rectangle((80, 400, 87, 407), fill=(0, 255, 0))  # one cell of stride 8
    return image


def test_finds_the_largest_first_and_squares_it_by_its_keypoints(pack: Path) -> None:
    finder = FaceAnalyzer(pack)
    assert finder.license == "CC0-1.0"
    faces = finder.detect_faces(photo(small=True))
    assert [round(face.area**0.5) for face in faces] == [96, 40]
    assert faces[0].box == pytest.approx((272, 208, 368, 304), abs=1)
    assert faces[0].embedding is not None and np.linalg.norm(faces[0].embedding) == pytest.approx(
        1, abs=1e-3
    )
    x, y, side, angle = faces[0].compute_aligned_crop_box(1.0)
    assert abs(x - 320) < 8 and 230 < y < 250 and 100 < side < 140 and abs(angle) < 1
    red = np.asarray(crop_image(photo(), faces[0].compute_aligned_crop_box(1.0), 32)).reshape(-1, 3)
    assert (red[:, 0] > 128).mean() > 0.05, "the square holds the face"


def test_a_turned_face_comes_out_upright(pack: Path) -> None:
    from dataclasses import replace

    face = FaceAnalyzer(pack).get_face(photo())
    turn = np.deg2rad(20)
    spin = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    middle = np.array([320.0, 256.0])
    turned = replace(face, keypoints=(face.keypoints - middle) @ spin.T + middle)
    eyes = Image.new("RGB", (640, 640), "black")
    for point in turned.keypoints[:2]:
        ImageDraw.Draw(eyes).ellipse((*(point - 4), *(point + 4)), fill="white")
    upright = (
        np.asarray(crop_image(eyes, turned.compute_aligned_crop_box(1.2), 128).convert("L")) > 128
    )
    rows, columns = np.nonzero(upright)
    left, right = rows[columns < 64].mean(), rows[columns >= 64].mean()
    assert abs(left - right) < 2, "the eyes are level"


def test_says_which_face_is_missing(pack: Path) -> None:
    finder = FaceAnalyzer(pack)
    with pytest.raises(InvalidImageError, match="no face was found"):
        finder.get_face(photo(large=False))
    with pytest.raises(InvalidImageError, match="face 1 was asked for, there are 1"):
        finder.get_face(photo(), 1)


def test_says_what_is_wrong_with_a_pack(pack: Path, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(ModelLoadError, match="there is no face pack 'antelope9'"):
        FaceAnalyzer("antelope9")
    with pytest.raises(ModelLoadError, match="holds no ONNX model"):
        FaceAnalyzer(tmp_path)
    tampered = shutil.copytree(pack, tmp_path / "tampered")
    with (tampered / "det_tiny.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelLoadError, match=r"tampered with .*SHA-256 mismatch"):
        FaceAnalyzer(tampered)
    half = shutil.copytree(pack, tmp_path / "half")
    for name in ("det_tiny.onnx", "manifest.json"):
        (half / name).unlink()
    with pytest.raises(ModelLoadError, match="has no detector"):
        FaceAnalyzer(half)
    bare = shutil.copytree(pack, tmp_path / "bare")
    (bare / "manifest.json").unlink()
    assert FaceAnalyzer(bare).license == UNKNOWN_LICENSE


def test_a_plan_crops_to_faces_and_goes_on_without_those_that_have_none(
    pack: Path, bundle: Any, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, image in (("one", photo()), ("two", photo(small=True)), ("none", photo(large=False))):
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
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    plan = read_plan(out)
    assert [row.subject for row in plan.rows] == ["one", "two"]
    assert plan.rows[0].photos[0].crop_box == pytest.approx(plan.rows[1].photos[0].crop_box, abs=1)
    assert (
        "none, none.png: no face was found" in done.stderr
        and "two, two.png: 2 faces, the largest" in done.stderr
    )
    assert plan.metadata == {"crop": "face", "face_pack": pack.name, "face_licence": "CC0-1.0"}
    second = CliRunner().invoke(
        app,
        [
            *map(str, arguments[:3]),
            str(tmp_path / "second"),
            *map(str, arguments[4:]),
            "--face",
            "1",
        ],
    )
    assert second.exit_code == 0 and [r.subject for r in read_plan(tmp_path / "second").rows] == [
        "two"
    ]
    refused = CliRunner().invoke(app, list(map(str, arguments[:-2])))
    assert refused.exit_code == 2 and "--face-pack" in refused.stderr
