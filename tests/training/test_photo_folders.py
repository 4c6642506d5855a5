"""Folders of photos become batches: references, targets, their order and captions."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hyperlora.data.images import read_image, to_tensor
from hyperlora.data.subjects import list_subjects
from hyperlora.errors import InvalidArgumentError, InvalidImageError
from hyperlora.training.augmentation import AugmentationConfig
from hyperlora.training.batches import SubjectBatch
from hyperlora.training.datamodules.base import FolderDataModule
from hyperlora.training.datamodules.face_filter import FaceFilterConfig
from hyperlora.training.datamodules.photo_folders import PhotoFolderDataModule
from hyperlora.training.datamodules.photo_samples import (
    SamplePlan,
    personalize_caption,
)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (None, "a photo of sks person"),
        ("a person in the rain", "sks person in the rain"),
        ("Portrait of the Person, smiling", "Portrait of sks person, smiling"),
        ("two persons", "a photo of sks person, two persons"),
        ("outdoors, red hat", "a photo of sks person, outdoors, red hat"),
        ("sks person with a person behind", "sks person with a person behind"),
        ("a portrait of {}, {0} smiling", "a portrait of sks person, {0} smiling"),
    ],
)
def test_personalize_caption_names_the_subject(caption: str | None, expected: str) -> None:
    assert personalize_caption(caption, "sks", "person", "a photo of sks person") == expected


def test_photo_folders_match_captions_to_targets(workspace: Path) -> None:
    folder = workspace / "photos/train"
    data = PhotoFolderDataModule(
        str(folder),
        str(folder),
        resolution=16,
        encoder_size=12,
        batch_size=3,
        num_views=4,
        num_targets=2,
        num_workers=0,
    )
    batch = next(iter(data.train_dataloader()))
    assert batch.photos.shape == (3, 4, 3, 12, 12)
    assert batch.images.shape == (6, 3, 16, 16)
    subjects = list_subjects(folder)
    for j in range(2):
        for i, subject_id in enumerate(batch.subject_ids.tolist()):
            subject, image = subjects[subject_id], batch.images[j * 3 + i]
            photos = torch.stack([to_tensor(read_image(p), 16) for p in subject.photos])
            (index,) = (photos == image).flatten(1).all(1).nonzero().flatten().tolist()
            expected = (
                "a photo of sks person"
                if subject.captions[index] is None
                else "sks person in the rain"
            )
            assert batch.captions[j * 3 + i] == expected


def test_photo_folders_validate_on_the_same_photos(workspace: Path) -> None:
    folder = str(workspace / "photos/validation")
    data = PhotoFolderDataModule(folder, folder, resolution=16, batch_size=2, num_workers=0)
    first, second = next(iter(data.val_dataloader())), next(iter(data.val_dataloader()))
    assert len(first.captions) == 2
    assert first.images.equal(second.images)
    assert first.photos.equal(second.photos)


def test_photo_folders_refuse_a_batch_of_too_many_subjects(workspace: Path) -> None:
    folder = str(workspace / "photos/validation")
    with pytest.raises(
        InvalidArgumentError, match=r"holds 2 subjects, one step takes 3: .*lower batch_size"
    ):
        PhotoFolderDataModule(folder, folder, resolution=16, batch_size=3).train_dataloader()


def save_photos(folder: Path, sizes: dict[str, list[tuple[int, int]]]) -> Path:
    """Photos of given widths and heights by subject; each has noise of its own."""
    for subject, photo_sizes in sizes.items():
        (folder / subject).mkdir(parents=True)
        for i, (width, height) in enumerate(photo_sizes):
            random = np.random.default_rng([i, *subject.encode()])
            pixels = random.integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(folder / subject / f"{i}.png")
    return folder


def make_data(folder: Path, **options: Any) -> PhotoFolderDataModule:
    arguments = {"resolution": 16, "encoder_size": 16, "batch_size": 2, "num_workers": 0}
    return PhotoFolderDataModule(str(folder), str(folder), **arguments | options)


def read_epoch(data: PhotoFolderDataModule, epoch: int = 0) -> list[SubjectBatch]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)  # type: ignore[arg-type]


def test_single_photo_gives_two_views(tmp_path: Path) -> None:
    folder = save_photos(tmp_path, {f"p{i}": [(30, 26)] for i in range(5)})
    data = make_data(folder, num_views=2, num_targets=2)
    references, targets = [], []
    for epoch in range(4):
        for batch in read_epoch(data, epoch):
            for i, subject in enumerate(batch.subject_ids.tolist()):
                views, images = batch.photos[i], batch.images[i::2]
                assert not any(torch.equal(view, image) for view in views for image in images)
                assert not torch.equal(views[0], views[1])
                references.append((subject, views[0].numpy().tobytes()))
                targets.append((subject, images[0].numpy().tobytes()))
    assert len(set(references)) == len(references) == 16  # a new view every time
    for subject in range(5):
        assert len({image for s, image in targets if s == subject}) <= 4  # numbered crops
    note = next(note for note in data.describe() if "one photo" in note)
    assert note.startswith("warning: 5 of 5 subjects")


def test_single_photos_may_be_their_own_targets_only_if_asked(tmp_path: Path) -> None:
    folder = save_photos(tmp_path, {f"p{i}": [(30, 26)] for i in range(4)})
    data = make_data(folder, single_photos="identical")
    (batch, _) = read_epoch(data)
    assert torch.equal(batch.photos[0, 0], batch.images[0])
    assert any("learns to copy" in note for note in data.describe())
    unchanged = AugmentationConfig(min_crop_scale=1.0, color_jitter=0.0)
    with pytest.raises(InvalidArgumentError, match="single photo would be its own target"):
        make_data(folder, augmentation=unchanged)
    make_data(folder, augmentation=unchanged, single_photos="identical")


def test_single_photos_may_be_skipped(tmp_path: Path) -> None:
    folder = save_photos(tmp_path, {"a": [(9, 9)], "b": [(9, 9)] * 2, "c": [(9, 9)] * 3})
    data = make_data(folder, single_photos="skip")
    names = [subject.name for subject in data.make_dataset(training=True).subjects]
    assert names == ["b", "c"]
    assert any("1 of 3 subjects" in n and "are left out" in n for n in data.describe())
    lonely = save_photos(tmp_path / "lonely", {"a": [(9, 9)]})
    with pytest.raises(InvalidArgumentError, match=r"every subject .* has one photo"):
        make_data(lonely, single_photos="skip").setup("fit")


def test_generated_views_are_references_only(tmp_path: Path) -> None:
    photos = save_photos(tmp_path / "photos", {"a": [(16, 16)], "b": [(16, 16)] * 3})
    views = save_photos(tmp_path / "views", {"a": [(20, 16)] * 2, "z": [(20, 16)]})
    data = make_data(photos, generated_views=str(views), num_views=2)
    allowed = {
        name: {to_tensor(read_image(p), 16).numpy().tobytes() for p in folder.glob("*.png")}
        for name, folder in (("photo", photos / "a"), ("view", views / "a"))
    }
    for epoch in range(3):
        for batch in read_epoch(data, epoch):
            i = batch.subject_ids.tolist().index(0)
            assert batch.images[i].numpy().tobytes() in allowed["photo"]
            assert {v.numpy().tobytes() for v in batch.photos[i]} == allowed["view"]
    notes = data.describe()
    assert any("generated views of 1 subjects" in note for note in notes)
    assert any("1 sub-folders" in note and "fit no one" in note for note in notes)
    assert not any("one photo" in note for note in notes[:3])
    with pytest.raises(InvalidArgumentError, match="has the name of a subject"):
        make_data(views, generated_views=str(photos / "a/..")).setup("fit") or make_data(
            save_photos(tmp_path / "c", {"c": [(9, 9)]}), generated_views=str(views)
        ).setup("fit")


def test_buckets_hold_targets_of_one_shape(tmp_path: Path) -> None:
    shapes = {"wide": (150, 80), "tall": (80, 150), "square": (90, 90)}
    sizes = {f"{name}{i}": [shape] * 3 for name, shape in shapes.items() for i in range(3)}
    sizes["mixed"] = [shapes["wide"], shapes["tall"]]
    folder = save_photos(tmp_path, sizes)
    data = make_data(folder, resolution=256, aspect_buckets=True, num_targets=2)
    shapes_seen, subjects_seen = set(), set()
    for epoch in range(4):
        for batch in read_epoch(data, epoch):
            assert batch.images.shape[:2] == (4, 3)
            shapes_seen.add(tuple(batch.images.shape[2:]))
            subjects_seen |= set(batch.subject_ids.tolist())
    assert shapes_seen == {(192, 320), (320, 192), (256, 256)}
    assert len(subjects_seen) == 10
    assert sum(len(b.captions) for b in data.val_dataloader()) == 10
    assert any("buckets" in note for note in data.describe())
    with pytest.raises(InvalidArgumentError, match="need a resolution of at least 128"):
        make_data(folder, aspect_buckets=True)


def test_workers_give_the_same_batches(tmp_path: Path) -> None:
    folder = save_photos(tmp_path, {f"p{i}": [(30, 26)] * (1 + i % 3) for i in range(6)})
    for first, second in zip(
        read_epoch(make_data(folder), 1),
        read_epoch(make_data(folder, num_workers=2), 1),
        strict=True,
    ):
        assert first.captions == second.captions
        assert torch.equal(first.photos, second.photos)
        assert torch.equal(first.images, second.images)


def test_damaged_photo_is_named_and_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_photos(tmp_path, {f"p{i}": [(30, 26)] for i in range(4)})
    whole = (folder / "p2/0.png").read_bytes()
    (folder / "p2/0.png").write_bytes(whole[: len(whole) // 2])
    data = make_data(folder)
    for epoch in range(3):
        ids = [i for batch in read_epoch(data, epoch) for i in batch.subject_ids.tolist()]
        assert len(ids) == 4
        assert 2 not in ids
    error = capsys.readouterr().err
    assert error.count("p2/0.png") == 3  # once for each loader, which starts anew
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(InvalidImageError, match="damaged"):
        read_epoch(data)


def test_dataset_of_the_hub_is_a_source(tmp_path: Path) -> None:
    from datasets import Dataset

    images = [Image.new("RGB", (20, 20), (40 * i, 0, 0)) for i in range(6)]
    people = ["a", "b", "a", "b", "a", "c"]
    Dataset.from_dict({"image": images, "person_id": people}).save_to_disk(tmp_path / "d")
    data = make_data(tmp_path / "d")
    assert data.describe()[0].endswith("3 subjects, 6 photos, by the column person_id.")
    (batch,) = read_epoch(data)
    assert batch.images.shape == (2, 3, 16, 16)


def test_faces_are_checked_and_references_cropped(tmp_path: Path) -> None:
    root = Path(__file__).parents[2] / "checkpoints/avatars"
    for name in sorted(path.name for path in (root / "test/subjects").iterdir())[:2]:
        shutil.copytree(root / "test/subjects" / name, tmp_path / name)
    Image.new("RGB", (128, 128), "gray").save(tmp_path / name / "nobody.png")
    faces = FaceFilterConfig(str(root / "face-pack"), min_face_size=40, det_size=128)
    options = {"encoder_size": 64, "resolution": 64}
    data, plain = make_data(tmp_path, faces=faces, **options), make_data(tmp_path, **options)
    split = data._get_split(training=True)
    num_photos = sum(len(s.photos) for s in plain._get_split(training=True).subjects)
    num_used = sum(len(subject.photos) for subject in split.subjects)
    assert num_used == len(split.maker.faces) < num_photos
    (note,) = (note for note in split.notes if "left out" in note)
    assert f"{num_photos - num_used} photos left out" in note
    assert "no face was found" in note
    plan = SamplePlan(0, (0,), (1,), (0,), (64, 64), None)
    (cropped, whole) = (
        d._get_split(training=True).maker.make(split.subjects[0], plan)["photos"]
        for d in (data, plain)
    )
    assert cropped.shape == whole.shape == (1, 3, 64, 64)
    assert not torch.equal(cropped, whole)


@pytest.mark.parametrize("name", ["strangers", "missing"])
def test_command_refuses_suspicious_folders_in_one_sentence(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "strangers":
        for group in ("a", "b"):
            (tmp_path / name / group).mkdir(parents=True)
            for i in range(210):
                (tmp_path / name / group / f"x{i}.png").touch()
        with pytest.raises(InvalidImageError, match=r"set source\.layout to strangers"):
            make_data(tmp_path / name).setup("fit")
    else:
        (tmp_path / "photos").mkdir()
        with pytest.raises(InvalidArgumentError, match="there is no folder 'photos/missing'"):
            make_data(Path("photos/missing"))


def test_folder_data_module_without_a_dataset_cannot_be_made() -> None:
    with pytest.raises(TypeError, match=r"abstract method '?make_dataset"):
        FolderDataModule()
