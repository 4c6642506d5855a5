"""Benchmarks of subjects on disk: the split of the photos, the number of subjects, the prompts."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from hyperlora.errors import InvalidArgumentError
from hyperlora.evaluation.benchmark import DEFAULT_PROMPTS, Prompt, load_benchmark

NUM_PHOTOS = {"cleo": 6, "ann": 5, "bob": 7}


def write_subjects(folder: Path, num_photos: dict[str, int] | None = None) -> Path:
    """Photo p of the s-th subject by name has the color (10 s, 20 p, 255)."""
    num_photos = num_photos or NUM_PHOTOS
    for s, name in enumerate(sorted(num_photos)):
        (folder / name).mkdir(parents=True)
        for p in range(num_photos[name]):
            Image.new("RGB", (9, 7), (10 * s, 20 * p, 255)).save(folder / name / f"{p}.png")
    return folder


def read_colors(photos: torch.Tensor) -> list[list[list[int]]]:
    """Red and green of each photo, which has one color."""
    assert torch.equal(photos, photos[..., :1, :1].expand_as(photos))
    assert (photos[:, :, 2] == 1).all()
    return (photos[:, :, :2, 0, 0] * 255).round().int().tolist()


def test_load_benchmark_splits_photos_of_each_subject(tmp_path: Path) -> None:
    """Of 5 photos, which the subject with fewest has, 2 are for conditioning."""
    write_subjects(tmp_path / "subjects")
    benchmark = load_benchmark(tmp_path, image_size=4)
    assert benchmark.names == ("ann", "bob", "cleo")
    assert benchmark.photos.shape == (3, 2, 3, 4, 4)
    assert benchmark.comparison_photos.shape == (3, 3, 3, 4, 4)
    reds = (0, 10, 20)
    assert read_colors(benchmark.photos) == [[[red, 0], [red, 20]] for red in reds]
    assert read_colors(benchmark.comparison_photos) == [
        [[red, 40], [red, 60], [red, 80]] for red in reds
    ]


def test_load_benchmark_takes_the_first_subjects_of_any_folder(tmp_path: Path) -> None:
    benchmark = load_benchmark(write_subjects(tmp_path), 4, max_subjects=2)
    assert benchmark.names == ("ann", "bob")
    assert tuple(prompt.prompt for prompt in benchmark.prompts) == DEFAULT_PROMPTS
    assert all(prompt.truth == {} for prompt in benchmark.prompts) and not benchmark.has_truth


@pytest.mark.parametrize("fewest", [1, 2])
def test_load_benchmark_needs_two_photos(fewest: int, tmp_path: Path) -> None:
    write_subjects(tmp_path, {"ann": 3, "bob": fewest})
    if fewest == 2:
        benchmark = load_benchmark(tmp_path, 4)
        assert benchmark.photos.shape[1] == benchmark.comparison_photos.shape[1] == 1
    else:
        with pytest.raises(InvalidArgumentError, match="'bob' has one photo"):
            load_benchmark(tmp_path, 4)


def test_load_benchmark_reads_prompts(tmp_path: Path) -> None:
    write_subjects(tmp_path / "subjects", {"ann": 2})
    entries = [{"prompt": "a hat", "truth": {"hat": "cap"}}, {"prompt": 7}]
    (tmp_path / "prompts.json").write_text(json.dumps(entries))
    benchmark = load_benchmark(tmp_path, 4)
    assert benchmark.prompts == (Prompt("a hat", {"hat": "cap"}), Prompt("7", {}))
    assert not benchmark.has_truth
    (tmp_path / "prompts.json").write_text(json.dumps(entries[:1]))
    assert load_benchmark(tmp_path, 4).has_truth


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is no list of"),
        ("[1]", "is no list of"),
        ('[{"truth": {}}]', "is no list of"),
        ('[{"prompt": "a", "truth": 1}]', "is no list of"),
        ("[]", "holds no prompt"),
    ],
)
def test_load_benchmark_refuses_malformed_prompts(text: str, message: str, tmp_path: Path) -> None:
    write_subjects(tmp_path / "subjects", {"ann": 2})
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(InvalidArgumentError, match=message):
        load_benchmark(tmp_path, 4)
