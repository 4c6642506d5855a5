"""``hyperlora generate``: photos to files."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.ImageFile import ImageFile

from hyperlora.cli.generate import _check_paths, _report_records
from hyperlora.data.images import compute_sha256
from hyperlora.errors import HyperloraError
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines import generate_folder
from hyperlora.pipelines.config import GenerationConfig
from hyperlora.pipelines.generate import GenerationRecord
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.lora_files import LoraFiles

RunCommand = Callable[..., Any]


def load_weights(path: Path) -> LoraWeights:
    return load_lora(path).weights


def read_index(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("num_photos", [1, 3])
def test_generate_writes_lora_with_metadata(
    run: RunCommand, bundle: Any, tmp_path: Path, format: str, num_photos: int
) -> None:
    photos = [bundle.subjects / "person-1" / f"{i}.png" for i in range(num_photos)]
    out = tmp_path / "new" / "me.safetensors"
    result = run("generate", *photos, "-o", out, "--model", bundle.model, "--format", format)
    assert result.code == 0, result
    assert str(out) in result.out
    model = ImageToLora.from_pretrained(str(bundle.model))
    lora_file = load_lora(out, model.layout)
    assert lora_file.format == format
    torch.testing.assert_close(lora_file.weights.flatten(), model(photos).weights.flatten())
    assert lora_file.metadata.trigger_phrase == "sks person"
    assert lora_file.metadata.title == "me"
    assert lora_file.metadata.resolution == (16, 16)
    assert lora_file.metadata.base_model == model.layout.base
    assert lora_file.metadata.reference_sha256 == tuple(compute_sha256(p) for p in photos)


def test_generate_differs_by_subject(run: RunCommand, bundle: Any, tmp_path: Path) -> None:
    for person in ("person-0", "person-1"):
        photo = bundle.subjects / person / "0.png"
        run("generate", photo, "-o", tmp_path / f"{person}.safetensors", "--model", bundle.model)
    first, second = (load_weights(p) for p in sorted(tmp_path.iterdir()))
    assert (first - second).compute_delta_norms().sum() > 0.05 * first.compute_delta_norms().sum()


def test_generate_applies_rank_and_strength(run: RunCommand, bundle: Any, tmp_path: Path) -> None:
    for name, options in {
        "plain": [],
        "twice": ["--strength", "2"],
        "four": ["--rank", "4"],
        "one": ["--rank", 1],
    }.items():
        result = run(
            "generate",
            bundle.photo,
            "-o",
            tmp_path / f"{name}.safetensors",
            "--model",
            bundle.model,
            *options,
        )
        assert result.code == 0, result
    plain_lora, twice, four, first = (
        load_weights(tmp_path / f"{n}.safetensors") for n in ("plain", "twice", "four", "one")
    )
    torch.testing.assert_close(twice.flatten(), (plain_lora * 2).flatten())
    assert (four.layout.rank, first.layout.rank) == (4, 1)
    for wide, full in zip(four.get_delta_weights(), plain_lora.get_delta_weights(), strict=True):
        torch.testing.assert_close(wide, full, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.flatten(), plain_lora.resize(1).flatten())


def test_refine_steps_change_lora_reproducibly(
    run: RunCommand, bundle: Any, tmp_path: Path
) -> None:
    options = ["--model", bundle.model, "--base", bundle.base]
    run("generate", bundle.photo, "-o", tmp_path / "plain.safetensors", *options)
    for name, extra in (("a", ()), ("b", ()), ("cut", ("--rank", 2))):
        torch.rand(3)  # the state of the global generator must not matter
        result = run(
            "generate",
            bundle.photo,
            "-o",
            tmp_path / f"{name}.safetensors",
            *options,
            "--refine-steps",
            2,
            *extra,
        )
        assert result.code == 0, result
    plain_lora, a, b, cut = (
        load_weights(tmp_path / f"{n}.safetensors") for n in ("plain", "a", "b", "cut")
    )
    assert cut.layout == plain_lora.layout == a.layout.with_rank(2)
    assert a.layout.rank == 10, "the rank of the fit on top is kept"
    for whole, part in zip(a.get_delta_weights(), cut.get_delta_weights(), strict=True):
        u, sigma, v = torch.linalg.svd(whole)
        torch.testing.assert_close(
            u[:, :2] * sigma[:2] @ v[:2], part, atol=1e-4 * float(sigma[0]), rtol=1e-3
        )
    assert (
        a - plain_lora
    ).compute_delta_norms().sum() > 1e-4 * plain_lora.compute_delta_norms().sum()
    assert torch.equal(a.flatten(), b.flatten())


def test_generate_prints_json(run: RunCommand, bundle: Any, tmp_path: Path) -> None:
    result = run(
        "generate",
        bundle.photo,
        "-o",
        tmp_path / "me.safetensors",
        "--model",
        bundle.model,
        "--json",
    )
    record = json.loads(result.out)
    assert (record["subject"], record["file"], record["num_photos"], record["error"]) == (
        "me",
        "me.safetensors",
        1,
        None,
    )
    assert record["seconds"] > 0


def test_generate_decodes_every_photo_once(
    bundle: Any, run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Any] = []
    load_image = ImageFile.load

    def record_load(image: ImageFile) -> Any:
        if image.tile:  # not loaded yet
            decoded.append(image)
        return load_image(image)

    monkeypatch.setattr(ImageFile, "load", record_load)
    run("generate", bundle.photo, "-o", tmp_path / "me.safetensors", "--model", bundle.model)
    assert len(decoded) == 1
    decoded.clear()
    run("generate", "--input-dir", bundle.subjects, "-o", tmp_path / "all", "--model", bundle.model)
    assert len(decoded) == 16


@pytest.fixture
def photos(bundle: Any, tmp_path: Path) -> Path:
    """Two folders of two photos and two single photos."""
    folder = tmp_path / "photos"
    for person in (0, 1):
        (folder / f"p{person}").mkdir(parents=True)
        for i in (0, 1):
            image = Image.open(bundle.subjects / f"person-{person}" / f"{i}.png")
            image.save(folder / f"p{person}" / f"{i}.png")
    for person in (2, 3):
        Image.open(bundle.subjects / f"person-{person}" / "0.png").save(folder / f"q{person}.png")
    return folder


def list_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_input_dir_writes_one_lora_per_subject(
    run: RunCommand, bundle: Any, photos: Path, tmp_path: Path
) -> None:
    result = run(
        "generate",
        "--input-dir",
        photos,
        "-o",
        tmp_path / "out",
        "--model",
        bundle.model,
        "--batch-size",
        3,
    )
    assert result.code == 0, result
    assert result.out.startswith("4 LoRAs and index.jsonl in")
    assert list_names(tmp_path / "out") == [
        "index.jsonl",
        *(f"{n}.safetensors" for n in ("p0", "p1", "q2", "q3")),
    ]
    model = ImageToLora.from_pretrained(str(bundle.model))
    for name, num_photos in {
        "p1": sorted((photos / "p1").iterdir()),
        "q3": [photos / "q3.png"],
    }.items():
        actual = load_lora(tmp_path / "out" / f"{name}.safetensors", model.layout).weights
        torch.testing.assert_close(
            actual.flatten(), model(num_photos).weights.flatten(), rtol=1e-4, atol=1e-5
        )
    lines = {line["subject"]: line for line in read_index(tmp_path / "out")}
    assert {name: line["num_photos"] for name, line in lines.items()} == {
        "p0": 2,
        "p1": 2,
        "q2": 1,
        "q3": 1,
    }


def test_input_dir_resumes_after_kill(
    run: RunCommand, bundle: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_dir, out = tmp_path / "whole", tmp_path / "out"
    arguments = ["generate", "--input-dir", photos, "--model", bundle.model, "--batch-size", 1]
    run(*arguments, "-o", whole_dir)
    write, saved_paths = LoraFiles.write, list[Path]()

    def interrupt_third(files: LoraFiles, path: Path) -> None:
        if len(saved_paths) == 2:
            raise KeyboardInterrupt
        saved_paths.append(path)
        write(files, path)

    with monkeypatch.context() as patch:
        patch.setattr(LoraFiles, "write", interrupt_third)
        run(*arguments, "-o", out)
    assert len(read_index(out)) == 2
    with (out / "index.jsonl").open("a") as lines:
        lines.write('{"subject": "p1", "fi')  # killed in the middle of a line
    assert run(*arguments, "-o", out).code == 0
    (out / "p0.safetensors").unlink()
    modified_ns = (out / "q3.safetensors").stat().st_mtime_ns
    assert run(*arguments, "-o", out).code == 0
    assert (out / "q3.safetensors").stat().st_mtime_ns == modified_ns
    assert list_names(out) == list_names(whole_dir)
    assert sorted(line["subject"] for line in read_index(out)) == ["p0", "p1", "q2", "q3"]
    for name in ("p0", "p1", "q2", "q3"):
        assert (out / f"{name}.safetensors").read_bytes() == (
            whole_dir / f"{name}.safetensors"
        ).read_bytes()


def test_input_dir_regenerates_after_changes(
    run: RunCommand, bundle: Any, photos: Path, tmp_path: Path
) -> None:
    arguments = ["generate", "--input-dir", photos, "-o", tmp_path / "out", "--model", bundle.model]
    run(*arguments)
    modified_times = {
        p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.safetensors")
    }
    (photos / "p0" / "2.png").write_bytes((photos / "q2.png").read_bytes())
    run(*arguments)
    rewritten = {
        n for n, t in modified_times.items() if (tmp_path / "out" / n).stat().st_mtime_ns != t
    }
    assert rewritten == {"p0.safetensors"}
    run(*arguments, "--rank", 1)
    assert {load_weights(tmp_path / "out" / n).layout.rank for n in modified_times} == {1}
    assert len(read_index(tmp_path / "out")) == 4


def test_input_dir_counts_photos_of_kinds_that_are_not_read(
    run: RunCommand, bundle: Any, photos: Path, tmp_path: Path
) -> None:
    photo = Image.open(photos / "q2.png")
    photo.save(photos / "p0" / "7.TIFF")
    photo.save(photos / "p0" / "8.Gif")
    for name in ("p0/9.NEF", "p1/IMG 1.dng", "zoe.cr3"):
        (photos / name).write_bytes(b"raw")
    (photos / "p1" / "._0.png").write_bytes(b"\0\5\x16\7")
    (photos / "__MACOSX").mkdir()
    out = tmp_path / "out"
    for _ in range(2):  # every run reports them again
        result = run("generate", "--input-dir", photos, "-o", out, "--model", bundle.model)
        assert result.code == 0, result
        assert result.err.count("skipped:") == result.err.count("is a camera RAW file") == 3
        assert "4 LoRAs and index.jsonl" in result.out and "3 photos skipped" in result.out
        index = read_index(out)
        assert sorted(line["subject"] for line in index if line["error"]) == ["p0", "p1", "zoe"]
        (count,) = [line["num_photos"] for line in index if line["file"] == "p0.safetensors"]
        assert count == len([p for p in (photos / "p0").iterdir() if p.suffix != ".NEF"])


def test_input_dir_names_photos_in_nested_folders(
    run: RunCommand, bundle: Any, photos: Path, tmp_path: Path
) -> None:
    nested_paths = [photos / name for name in ("p0/old/7.png", "p1/a/b/8.jpg", "p1/a/9.png")]
    for path in nested_paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(photos / "q2.png").convert("RGB").save(path)
    out = tmp_path / "out"
    result = run("generate", "--input-dir", photos, "-o", out, "--model", bundle.model)
    assert result.code == 0, result
    assert "4 LoRAs and index.jsonl" in result.out and "3 photos skipped" in result.out
    for path in nested_paths:
        assert f"skipped: {str(path)!r} is a photo in a folder within" in result.err
    errors = [line["subject"] for line in read_index(out) if line["error"]]
    assert sorted(errors) == ["p0", "p1", "p1"]


def test_input_dir_reports_and_skips_subjects_without_photos(
    run: RunCommand, bundle: Any, photos: Path, tmp_path: Path
) -> None:
    for name in ("empty", "notes\nskipped: nothing"):
        (photos / name).mkdir()
    (photos / "notes\nskipped: nothing" / "me.md").write_text("x")
    (photos / "me").symlink_to("me")
    (photos / "zoe.png").write_bytes((photos / "q3.png").read_bytes())
    (photos / "zoe").mkdir()
    (photos / "zoe" / "0.png").write_bytes((photos / "q2.png").read_bytes())
    out = tmp_path / "out"
    for _ in range(2):
        result = run("generate", "--input-dir", photos, "-o", out, "--model", bundle.model)
        assert result.code == 0, result
        assert sum(line.startswith("skipped: ") for line in result.err.splitlines()) == 3
        assert result.err.count("holds no image") == 2 and "two subjects called" in result.err
        assert list_names(out) == [
            "index.jsonl",
            *(f"{n}.safetensors" for n in ("p0", "p1", "q2", "q3", "zoe")),
        ]


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"subject": 3, "file": 4, "num_photos": 1, "seconds": 0}',
        b'{"subject": ["a"], "file": "p0.safetensors", "num_photos": 1, "seconds": 0}',
        b'{"subject": "p0", "file": "a", "num_photos": 1, "seconds": 0, "warnings": 5}',
    ],
)
def test_read_index_skips_other_lines(line: bytes, tmp_path: Path) -> None:
    record = GenerationRecord("p1", "p1.safetensors", 1, 0.5)
    path = tmp_path / "index.jsonl"
    path.write_bytes(line + b"\n" + json.dumps(asdict(record)).encode() + b"\n")
    assert list(generate_folder._read_index(path)) == [record]


def test_report_records_keeps_names_on_their_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = GenerationRecord("a\nwarning: b\x1b[31m", "a.safetensors", 1, 0.5, warnings=["dark"])
    _report_records([record], tmp_path, tmp_path, GenerationConfig(), True, "")
    assert capsys.readouterr().err == "warning: a�warning: b�[31m: dark\n"


def test_check_paths_takes_links_that_lead_back(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(HyperloraError):
        _check_paths([], tmp_path, tmp_path / "loop" / "out")


def test_input_dir_reports_and_skips_bad_photos(
    run: RunCommand, bundle: Any, photos: Path, tmp_path: Path
) -> None:
    (photos / "p1" / "0.png").write_bytes(b"no image")
    (photos / "q2.png").write_bytes(b"")
    out = tmp_path / "out"
    for _ in range(2):  # every run reports them again
        result = run("generate", "--input-dir", photos, "-o", out, "--model", bundle.model)
        assert result.code == 0, result
        assert result.err.count("skipped:") == 2
        assert "q2.png' is empty" in result.err
        assert list_names(out) == ["index.jsonl", *(f"{n}.safetensors" for n in ("p0", "p1", "q3"))]
        assert sorted((line["subject"], bool(line["file"])) for line in read_index(out)) == [
            ("p0", True),
            ("p1", False),
            ("p1", True),
            ("q2", False),
            ("q3", True),
        ]
    (photos / "q2.png").write_bytes((photos / "q3.png").read_bytes())
    record = json.loads(
        run("generate", "--input-dir", photos, "-o", out, "--model", bundle.model, "--json").out
    )
    assert {line["subject"] for line in record if line["file"]} == {"p0", "p1", "q2", "q3"}


@pytest.mark.parametrize(
    "name", ["a:b*", "-rf", "ä" * 120, "line\nbreak", "[bold]x", "b\udcff", "é l'ami"]
)
def test_input_dir_writes_safe_file_names(
    run: RunCommand, bundle: Any, photos: Path, tmp_path: Path, name: str
) -> None:
    try:
        (photos / "q2.png").rename(photos / f"{name}.png")
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system refuses the name")
    out = tmp_path / "out"
    assert run("generate", "--input-dir", photos, "-o", out, "--model", bundle.model).code == 0
    actual = next(line["file"] for line in read_index(out) if line["subject"] == name)
    assert Path(actual).name == actual
    assert len(actual.encode()) < 200
    assert actual[0] not in "-."
    assert not set(actual) & set(':*?"<>|\\\n')
    assert load_weights(out / actual).layout.rank == 2


def test_make_file_stem_returns_distinct_names() -> None:
    stems = [
        generate_folder.make_file_stem(name)
        for name in ("a:b", "a*b", "a_b", "plain", ".hidden", "..", "")
    ]
    assert len({*stems}) == len(stems)
    assert stems[2:4] == ["a_b", "plain"]
