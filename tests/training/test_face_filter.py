"""Photos without one large and sharp face are left out, counted and named by their reasons."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from hyperlora.data.photos import FilePhoto, SubjectPhotos
from hyperlora.data.subject_sources import FolderSource
from hyperlora.encoders.face_analysis import Face
from hyperlora.errors import InvalidArgumentError
from hyperlora.training.augmentation import Box
from hyperlora.training.datamodules.face_filter import (
    FaceFilterConfig,
    FaceIndex,
    filter_subjects,
    measure_sharpness,
)

CONFIG = FaceFilterConfig("no pack is loaded", min_face_size=20, min_sharpness=10)


class FakeAnalyzer:
    """Finds a face for each bright pixel in the first row: its value is the side of the box."""

    def __init__(self) -> None:
        self.num_calls = 0

    def detect_faces(self, image: Image.Image) -> list[Face]:
        self.num_calls += 1
        sides = [v for v in np.asarray(image)[0, :, 0].tolist() if v]
        boxes: list[Box] = [(4.0, 4.0, 4.0 + v, 4.0 + v) for v in sorted(sides, reverse=True)]
        keypoints = np.array([[38, 52], [74, 52], [56, 72], [42, 92], [71, 92]], float) * 0.3
        return [Face(box, 0.9, keypoints) for box in boxes]


def save_photo(path: Path, sides: list[int], blur: float = 0.0) -> FilePhoto:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 70, 3), np.uint8)
    image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(blur))
    pixels = np.asarray(image).copy()
    pixels[0] = 0
    pixels[0, : len(sides), 0] = sides
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return FilePhoto(path.name, None, path)


def make_index(config: FaceFilterConfig = CONFIG, folder: Path | None = None) -> FaceIndex:
    return FaceIndex(config, folder, FakeAnalyzer())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sides", "blur", "options", "reason"),
    [
        ([40], 0, {}, None),
        ([], 0, {}, "no face was found"),
        ([40, 30], 0, {}, "more than 1 face(s)"),
        ([40, 30], 0, {"max_faces": 2}, None),
        ([40, 15], 0, {}, None),  # a passer-by
        ([19], 0, {}, "the face is smaller than 20 pixels"),
        ([40], 3, {}, "the face is not sharp"),
        ([40], 3, {"min_sharpness": 0}, None),
    ],
)
def test_face_is_checked(
    tmp_path: Path, sides: list[int], blur: float, options: dict[str, float], reason: str | None
) -> None:
    photo = save_photo(tmp_path / "a.png", sides, blur)
    index = make_index(replace(CONFIG, **options))  # type: ignore[arg-type]
    index.inspect([("id", photo)])
    record = index.records["id"]
    assert record.reason == reason
    assert (record.box is None) == (record.crop is None) == (reason is not None)


def test_filter_counts_by_reason(tmp_path: Path) -> None:
    photos = {
        "anna": [[40], [], [33]],
        "ben": [[], [10]],
        "zoe": [[50]],
    }
    subjects = [
        SubjectPhotos(
            name,
            tuple(
                replace(save_photo(tmp_path / name / f"{i}.png", s), key=f"{name}/{i}")
                for i, s in enumerate(sides)
            ),
        )
        for name, sides in photos.items()
    ]
    (tmp_path / "zoe/1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    broken = FilePhoto("zoe/1", None, tmp_path / "zoe/1.png")
    subjects[2] = SubjectPhotos("zoe", (*subjects[2].photos, broken))
    index = make_index()
    index.inspect([(p.key, p) for s in subjects for p in s.photos])
    kept, counts = filter_subjects(subjects, lambda photo: index.records[photo.key].reason)
    assert {s.name: [p.key for p in s.photos] for s in kept} == {
        "anna": ["anna/0", "anna/2"],
        "zoe": ["zoe/0"],
    }
    assert counts == {
        "no face was found": 2,
        "the face is smaller than 20 pixels": 1,
        "cannot be read": 1,
    }
    num_kept = sum(len(s.photos) for s in kept)
    assert num_kept + Counter(counts).total() == sum(len(s.photos) for s in subjects)
    with pytest.raises(InvalidArgumentError, match="no photo is good enough"):
        filter_subjects(subjects, lambda _: "of a reason")


def test_index_is_kept_until_a_photo_changes(tmp_path: Path) -> None:
    photo = save_photo(tmp_path / "a.png", [40])
    make_index(folder=tmp_path / "index").inspect([("id", photo)])
    (path,) = (tmp_path / "index").iterdir()
    with path.open("a") as file:
        file.write('["cut off", {"signa')
    index = make_index(folder=tmp_path / "index")
    assert index.records.keys() == {"id"}
    index.inspect([("id", photo)])
    assert index._analyzer.num_calls == 0  # type: ignore[union-attr]
    save_photo(tmp_path / "a.png", [])
    index.inspect([("id", photo)])
    assert index.records["id"].reason == "no face was found"
    stricter = make_index(replace(CONFIG, min_face_size=60), tmp_path / "index")
    assert not stricter.records  # other limits, another index


def test_sharpness_falls_with_blur_and_not_with_size() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    image = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)
    values = [
        measure_sharpness(image.filter(ImageFilter.GaussianBlur(radius)), (0, 0, 224, 224))
        for radius in (0, 2, 4, 8)
    ]
    assert values == sorted(values, reverse=True)
    larger = image.resize((448, 448), Image.Resampling.BICUBIC)
    assert measure_sharpness(larger, (0, 0, 448, 448)) == pytest.approx(values[0], rel=0.1)
    assert measure_sharpness(image, (-50, -50, 0, 0)) == 0


@pytest.mark.slow
def test_bundled_pack_finds_the_bundled_portraits() -> None:
    root = Path(__file__).parents[2] / "checkpoints/avatars"
    subjects = FolderSource(str(root / "test/subjects")).list_subjects()[:3]
    index = FaceIndex(FaceFilterConfig(str(root / "face-pack"), min_face_size=32))
    photos = [(p.key, p) for s in subjects for p in s.photos[:2]]
    index.inspect(photos)
    assert [record.reason for record in index.records.values()] == [None] * len(photos)
