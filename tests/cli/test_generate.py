"""``main_callback generate_loras``: photos to files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.ImageFile import ImageFile

from hyperlora.data.images import compute_sha256
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines import generate_folder
from hyperlora.pipelines.image_to_lora import ImageToLora

Run = Callable[..., Any]


def weights(path: Path) -> LoraWeights:
    return load_lora(path).weights


def index(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("views", [1, 3])
def test_photos_to_a_file(run: Run, bundle: Any, tmp_path: Path, format: str, views: int) -> None:
    photos = [bundle.subjects / "person-1" / f"{i}.png" for i in range(views)]
    out = tmp_path / "new" / "me.safetensors"
    ran = run("generate", *photos, "-o", out, "--model", bundle.model, "--format", format)
    assert ran.code == 0, ran
    assert str(out) in ran.out
    model = ImageToLora.from_pretrained(str(bundle.model))
    file = load_lora(out, model.layout)
    assert file.format == format
    torch.testing.assert_close(file.weights.flatten(), model(photos).flatten())
    assert file.metadata.trigger_phrase == "sks person"
    assert file.metadata.title == "me"
    assert file.metadata.resolution == (16, 16)
    assert file.metadata.base_model == model.layout.base
    assert file.metadata.reference_sha256 == tuple(compute_sha256(p) for p in photos)


def test_people_differ(run: Run, bundle: Any, tmp_path: Path) -> None:
    for person in ("person-0", "person-1"):
        photo = bundle.subjects / person / "0.png"
        run("generate", photo, "-o", tmp_path / f"{person}.safetensors", "--model", bundle.model)
    one, other = (weights(p) for p in sorted(tmp_path.iterdir()))
    assert (one - other).compute_delta_norms().sum() > 0.05 * one.compute_delta_norms().sum()


def test_rank_and_strength(run: Run, bundle: Any, tmp_path: Path) -> None:
    for name, options in {
        "plain": [],
        "twice": ["--strength", "2"],
        "four": ["--rank", "4"],
        "one": ["--rank", 1],
    }.items():
        ran = run(
            "generate",
            bundle.photo,
            "-o",
            tmp_path / f"{name}.safetensors",
            "--model",
            bundle.model,
            *options,
        )
        assert ran.code == 0, ran
    plain, twice, four, one = (
        weights(tmp_path / f"{n}.safetensors") for n in ("plain", "twice", "four", "one")
    )
    torch.testing.assert_close(twice.flatten(), (plain * 2).flatten())
    assert (four.layout.rank, one.layout.rank) == (4, 1)
    for wide, full in zip(four.get_delta_weights(), plain.get_delta_weights(), strict=True):
        torch.testing.assert_close(wide, full, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.flatten(), plain.resize(1).flatten())


def test_refining_changes_the_lora_and_repeats_exactly(
    run: Run, bundle: Any, tmp_path: Path
) -> None:
    options = ["--model", bundle.model, "--base", bundle.base]
    run("generate", bundle.photo, "-o", tmp_path / "plain.safetensors", *options)
    for name in ("a", "b"):
        torch.rand(3)  # the state of the global generator must not matter
        ran = run(
            "generate",
            bundle.photo,
            "-o",
            tmp_path / f"{name}.safetensors",
            *options,
            "--refine",
            2,
        )
        assert ran.code == 0, ran
    plain, a, b = (weights(tmp_path / f"{n}.safetensors") for n in ("plain", "a", "b"))
    assert a.layout == plain.layout
    assert (a - plain).compute_delta_norms().sum() > 1e-4 * plain.compute_delta_norms().sum()
    assert torch.equal(a.flatten(), b.flatten())


def test_json(run: Run, bundle: Any, tmp_path: Path) -> None:
    ran = run(
        "generate",
        bundle.photo,
        "-o",
        tmp_path / "me.safetensors",
        "--model",
        bundle.model,
        "--json",
    )
    said = json.loads(ran.out)
    assert (said["subject"], said["file"], said["photos"], said["error"]) == (
        "me",
        "me.safetensors",
        1,
        None,
    )
    assert said["seconds"] > 0


def test_every_photo_is_decoded_once(
    bundle: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Any] = []
    load = ImageFile.load

    def counted(image: ImageFile) -> Any:
        if image.tile:  # not loaded yet
            decoded.append(image)
        return load(image)

    monkeypatch.setattr(ImageFile, "load", counted)
    run("generate", bundle.photo, "-o", tmp_path / "me.safetensors", "--model", bundle.model)
    assert len(decoded) == 1
    decoded.clear()
    run("generate", "--batch", bundle.subjects, "-o", tmp_path / "all", "--model", bundle.model)
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


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_of_subjects(run: Run, bundle: Any, photos: Path, tmp_path: Path) -> None:
    ran = run(
        "generate",
        "--batch",
        photos,
        "-o",
        tmp_path / "out",
        "--model",
        bundle.model,
        "--batch-size",
        3,
    )
    assert ran.code == 0, ran
    assert ran.out.startswith("4 LoRAs and index.jsonl in")
    assert files(tmp_path / "out") == [
        "index.jsonl",
        *(f"{n}.safetensors" for n in ("p0", "p1", "q2", "q3")),
    ]
    model = ImageToLora.from_pretrained(str(bundle.model))
    for name, views in {"p1": sorted((photos / "p1").iterdir()), "q3": [photos / "q3.png"]}.items():
        made = load_lora(tmp_path / "out" / f"{name}.safetensors", model.layout).weights
        torch.testing.assert_close(made.flatten(), model(views).flatten(), rtol=1e-4, atol=1e-5)
    lines = {line["subject"]: line for line in index(tmp_path / "out")}
    assert {name: line["photos"] for name, line in lines.items()} == {
        "p0": 2,
        "p1": 2,
        "q2": 1,
        "q3": 1,
    }


def test_a_killed_run_resumes(
    run: Run, bundle: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    arguments = ["generate", "--batch", photos, "--model", bundle.model, "--batch-size", 1]
    run(*arguments, "-o", whole)
    save, saved = generate_folder.write_bytes, []

    def killed(*args: Any, **options: Any) -> Any:
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(args[1])
        return save(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(generate_folder, "write_bytes", killed)
        run(*arguments, "-o", out)
    assert len(index(out)) == 2
    with (out / "index.jsonl").open("a") as lines:
        lines.write('{"subject": "p1", "fi')  # killed in the middle of a line
    assert run(*arguments, "-o", out).code == 0
    (out / "p0.safetensors").unlink()
    before = (out / "q3.safetensors").stat().st_mtime_ns
    assert run(*arguments, "-o", out).code == 0
    assert (out / "q3.safetensors").stat().st_mtime_ns == before
    assert files(out) == files(whole)
    assert sorted(line["subject"] for line in index(out)) == ["p0", "p1", "q2", "q3"]
    for name in ("p0", "p1", "q2", "q3"):
        assert (out / f"{name}.safetensors").read_bytes() == (
            whole / f"{name}.safetensors"
        ).read_bytes()


def test_other_settings_or_more_photos_are_made_again(
    run: Run, bundle: Any, photos: Path, tmp_path: Path
) -> None:
    arguments = ["generate", "--batch", photos, "-o", tmp_path / "out", "--model", bundle.model]
    run(*arguments)
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.safetensors")}
    (photos / "p0" / "2.png").write_bytes((photos / "q2.png").read_bytes())
    run(*arguments)
    changed = {n for n, t in times.items() if (tmp_path / "out" / n).stat().st_mtime_ns != t}
    assert changed == {"p0.safetensors"}
    run(*arguments, "--rank", 1)
    assert {weights(tmp_path / "out" / n).layout.rank for n in times} == {1}
    assert len(index(tmp_path / "out")) == 4


def test_a_bad_photo_is_told_and_skipped(
    run: Run, bundle: Any, photos: Path, tmp_path: Path
) -> None:
    (photos / "p1" / "0.png").write_bytes(b"no image")
    (photos / "q2.png").write_bytes(b"")
    out = tmp_path / "out"
    for _ in range(2):  # told again by every run, until mended
        ran = run("generate", "--batch", photos, "-o", out, "--model", bundle.model)
        assert ran.code == 0, ran
        assert ran.err.count("skipped:") == 2
        assert "q2.png' is empty" in ran.err
        assert files(out) == ["index.jsonl", *(f"{n}.safetensors" for n in ("p0", "p1", "q3"))]
        assert sorted((line["subject"], bool(line["file"])) for line in index(out)) == [
            ("p0", True),
            ("p1", False),
            ("p1", True),
            ("q2", False),
            ("q3", True),
        ]
    (photos / "q2.png").write_bytes((photos / "q3.png").read_bytes())
    said = json.loads(
        run("generate", "--batch", photos, "-o", out, "--model", bundle.model, "--json").out
    )
    assert {line["subject"] for line in said if line["file"]} == {"p0", "p1", "q2", "q3"}


@pytest.mark.parametrize(
    "name", ["a:b*", "-rf", "ä" * 120, "line\nbreak", "[bold]x", "b\udcff", "é l'ami"]
)
def test_names_that_file_systems_refuse(
    run: Run, bundle: Any, photos: Path, tmp_path: Path, name: str
) -> None:
    try:
        (photos / "q2.png").rename(photos / f"{name}.png")
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system refuses the name")
    out = tmp_path / "out"
    assert run("generate", "--batch", photos, "-o", out, "--model", bundle.model).code == 0
    made = next(line["file"] for line in index(out) if line["subject"] == name)
    assert Path(made).name == made
    assert len(made.encode()) < 200
    assert made[0] not in "-."
    assert not set(made) & set(':*?"<>|\\\n')
    assert weights(out / made).layout.rank == 2


def test_safe_names_never_meet() -> None:
    stems = [
        generate_folder.make_file_stem(name)
        for name in ("a:b", "a*b", "a_b", "plain", ".hidden", "..", "")
    ]
    assert len({*stems}) == len(stems)
    assert stems[2:4] == ["a_b", "plain"]
