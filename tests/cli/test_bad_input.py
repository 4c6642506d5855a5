"""What a user gets wrong: one sentence on stderr, exit code 2, nothing written."""

import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hyperlora.lora.io.load import load_lora
from hyperlora.pipelines import generate_folder
from hyperlora.pipelines.image_to_lora import ImageToLora

Run = Callable[..., Any]


def refused(ran: Any, sentence: str, code: int = 2) -> None:
    assert ran.code == code, ran
    assert "Traceback" not in ran.err
    lines = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ran.err
    assert sentence in lines[0]
    assert not ran.out


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def huge_png(side: int = 20_000) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    pixels = zlib.compress(bytes((side // 8 + 1) * side))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 20, 3), np.uint8))
BAD_PHOTOS = {
    "no image": (b"hello", "PNG, JPEG or WEBP image was expected"),
    "empty": (b"", "is empty"),
    "cut off": (encoded(PHOTO)[:400], "damaged or cut off"),
    "huge": (huge_png(), "is 20000×20000, at most 25 megapixels"),
    "GIF": (encoded(PHOTO, "GIF"), "is another kind of file"),
}


@pytest.mark.parametrize("case", BAD_PHOTOS)
def test_bad_photos(run: Run, bundle: Any, tmp_path: Path, case: str) -> None:
    content, sentence = BAD_PHOTOS[case]
    bad, out = tmp_path / "bad.png", tmp_path / "out" / "x.safetensors"
    bad.write_bytes(content)
    refused(run("generate", bundle.photo, bad, "-o", out, "--model", bundle.model), sentence)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.png"]


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(
        PHOTO.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=100, subsampling=0
    )


ODD_PHOTOS = {
    "CMYK": encoded(PHOTO.convert("CMYK"), "JPEG"),
    "16 bit": encoded(
        Image.fromarray(np.linspace(0, 65535, 600).reshape(30, 20).astype(np.uint16))
    ),
    "alpha": encoded(PHOTO.convert("RGBA")),
    "rotated by EXIF": rotated(),
}


@pytest.mark.parametrize("case", ODD_PHOTOS)
def test_odd_photos_work(run: Run, bundle: Any, tmp_path: Path, case: str) -> None:
    (tmp_path / "odd").write_bytes(ODD_PHOTOS[case])
    ran = run(
        "generate", tmp_path / "odd", "-o", tmp_path / "x.safetensors", "--model", bundle.model
    )
    assert ran.code == 0, ran
    made = load_lora(
        tmp_path / "x.safetensors", ImageToLora.from_pretrained(str(bundle.model)).layout
    ).weights
    if case != "16 bit":
        upright = ImageToLora.from_pretrained(str(bundle.model))(PHOTO)
        tolerance = 1e-6 if case == "alpha" else 0.1
        assert (
            made - upright
        ).compute_delta_norms().sum() <= tolerance * upright.compute_delta_norms().sum() + 1e-3


def test_bad_requests(run: Run, bundle: Any, tmp_path: Path) -> None:
    file, empty = tmp_path / "file", tmp_path / "empty"
    file.write_text("x")
    empty.mkdir()
    photo, lora = [bundle.photo, "--model", bundle.model], tmp_path / "x.safetensors"
    cases: list[tuple[list[Any], str]] = [
        (["generate", *photo], "Give -o FILE"),
        (["generate", "-o", lora], "photos of one subject, or --batch FOLDER"),
        (["generate", *photo, "--batch", empty, "-o", lora], "not both"),
        (["generate", *photo, "-o", tmp_path / "x.bin"], "ends in .safetensors"),
        (
            ["generate", *photo, "-o", file / "x.safetensors"],
            "file' is a file, a folder was expected",
        ),
        (["generate", *photo, "-o", lora, "--format", "onnx"], "unknown format 'onnx'"),
        (["generate", *photo, "-o", lora, "--strength", "nan"], "strength between -10 and 10"),
        (["generate", *photo, "-o", lora, "--rank", 100_000], "rank 100000 asked for"),
        (["generate", tmp_path / "none.png", "-o", lora], "there is no file"),
        (
            ["generate", bundle.photo, "-o", lora, "--model", tmp_path / "none"],
            "none' is neither a folder nor",
        ),
        (
            ["generate", bundle.photo, "-o", lora, "--model", empty],
            "config.json, layout.json, model.safetensors missing",
        ),
        (
            ["generate", *photo, "-o", lora, "--refine", 1, "--base", empty],
            "model_index.json expected",
        ),
        (["generate", *photo, "-o", lora, "--refine-by", "photos"], "give --refine STEPS too"),
        (
            ["generate", "--batch", empty, "-o", tmp_path / "out", "--model", bundle.model],
            "empty' holds no subject",
        ),
        (
            ["generate", "--batch", file, "-o", tmp_path / "out", "--model", bundle.model],
            "file' is a file",
        ),
        (
            ["generate", "--batch", empty, "-o", file, "--model", bundle.model],
            "is a file, a folder was expected",
        ),
        (
            ["generate", "--batch", empty, "-o", empty / "out", "--model", bundle.model],
            "would count as a subject",
        ),
        (["inspect", tmp_path / "none.safetensors"], "there is no file"),
        (["inspect", file], "not a .safetensors file"),
        (
            ["render", "--prompt", "x", "-o", tmp_path / "x.png", "--base", tmp_path / "none"],
            "none' cannot be loaded",
        ),
        (
            ["render", "--prompt", "x", "-o", tmp_path / "x.jpg", "--base", bundle.base],
            "ends in .png",
        ),
        (
            [
                "render",
                "--prompt",
                "x",
                "-o",
                tmp_path / "x.png",
                "--base",
                bundle.base,
                "--lora",
                "x:nan",
            ],
            "got 'nan'",
        ),
        (
            [
                "render",
                "--prompt",
                "x",
                "-o",
                tmp_path / "x.png",
                "--base",
                bundle.base,
                "--lora",
                "x",
            ],
            "safetensors",
        ),
        (
            ["evaluate", empty, *photo[1:], "--base", bundle.base, "--evaluator", bundle.evaluator],
            "holds no subject",
        ),
        (
            ["evaluate", bundle.benchmark, *photo[1:], "--base", bundle.base, "--evaluator", empty],
            "holds no reader",
        ),
        (
            ["evaluate", bundle.benchmark, *photo[1:], "--base", bundle.base, "--report", file],
            "is a file",
        ),
    ]
    for arguments, sentence in cases:
        refused(run(*arguments), sentence)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"], arguments
        assert not list(empty.iterdir()), arguments


@pytest.mark.parametrize(
    "option",
    [["--rank", -1], ["--refine", -1], ["--batch-size", 0], ["--rank", "x"], ["--nonsense"]],
)
def test_options_out_of_range(run: Run, bundle: Any, tmp_path: Path, option: list[Any]) -> None:
    ran = run("generate", bundle.photo, "-o", tmp_path / "x.safetensors", *option)
    assert ran.code == 2
    assert option[0] in ran.err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def lora(bundle: Any, tmp_path: Path) -> Path:
    return ImageToLora.from_pretrained(str(bundle.model))(bundle.photo).save(
        tmp_path / "x.safetensors"
    )


def test_bad_loras(run: Run, bundle: Any, lora: Path, tmp_path: Path) -> None:
    good = load_file(lora)
    key = next(iter(good))
    cases = {
        "NaN": ({**good, key: torch.full_like(good[key], torch.nan)}, "holds NaN"),
        "climbing": ({**good, "../../etc/x.lora_A.weight": torch.ones(2, 2)}, "no module path"),
        "partial": ({k: v for k, v in good.items() if k != key}, "but no"),
        "unknown site": (
            {k.replace("attn1", "attn7"): v for k, v in good.items()},
            "this base lacks",
        ),
        "another width": (
            {k: v[:, :-1] if k.endswith("lora_A.weight") else v for k, v in good.items()},
            "expected",
        ),
    }
    for state, sentence in cases.values():
        save_file({k: v.contiguous() for k, v in state.items()}, lora)
        refused(run("inspect", lora, "--base", bundle.base), sentence)
        out = tmp_path / "x.png"
        refused(
            run(
                "render",
                "--prompt",
                "x",
                "--lora",
                lora,
                "-o",
                out,
                "--base",
                bundle.base,
                "--steps",
                1,
            ),
            sentence,
        )
        assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_model_of_another_base(run: Run, bundle: Any, tmp_path: Path) -> None:
    other = tmp_path / "other" / "base"
    other.parent.mkdir()
    shutil.copytree(bundle.base, other)
    photo = [bundle.photo, "-o", tmp_path / "x.safetensors", "--model", bundle.model]
    refused(run("generate", *photo, "--refine", 1, "--base", other), "this base is 'other/base'")
    models = ["--model", bundle.model, "--base", other, "--evaluator", bundle.evaluator]
    refused(run("evaluate", bundle.benchmark, *models), "this base is 'other/base'")


@pytest.mark.parametrize("name", ["config.json", "layout.json", "model.safetensors"])
def test_a_damaged_model(run: Run, bundle: Any, tmp_path: Path, name: str) -> None:
    model = shutil.copytree(bundle.model, tmp_path / "model")
    (model / name).write_text("{}")
    out = tmp_path / "x.safetensors"
    refused(run("generate", bundle.photo, "-o", out, "--model", model), "damaged ImageToLora model")
    (model / name).write_bytes(b"\xff half")
    refused(run("generate", bundle.photo, "-o", out, "--model", model), "damaged ImageToLora model")
    assert not out.exists()


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ("{", "is no list of"),
        ('[{"text": 1}]', "is no list of"),
        ("[]", "holds no prompt"),
        (
            '[{"prompt": "x", "truth": {"mood": "sad"}}]',
            "mood = 'sad' of prompt 'x' is unknown to the evaluator",
        ),
        ('[{"prompt": "x", "truth": {"glasses": "blue"}}]', "glasses = 'blue'"),
    ],
)
def test_bad_benchmarks(run: Run, bundle: Any, tmp_path: Path, prompts: str, sentence: str) -> None:
    (tmp_path / "subjects").symlink_to(bundle.subjects)
    (tmp_path / "prompts.json").write_text(prompts)
    models = ["--model", bundle.model, "--base", bundle.base, "--evaluator", bundle.evaluator]
    refused(run("evaluate", tmp_path, *models, "--report", tmp_path / "report"), sentence)
    assert not (tmp_path / "report").exists()


def test_all_photos_bad(run: Run, bundle: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"x")
    ran = run(
        "generate", "--batch", tmp_path / "in", "-o", tmp_path / "out", "--model", bundle.model
    )
    refused(ran, "no LoRA could be made")
    assert "skipped: " in ran.err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["index.jsonl"]


def test_a_full_disk(
    run: Run, bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", "x.safetensors")

    monkeypatch.setattr(os, "fsync", full)
    ran = run("generate", bundle.photo, "-o", tmp_path / "x.safetensors", "--model", bundle.model)
    refused(ran, "x.safetensors: No space left on device", code=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_folder_without_permission(run: Run, bundle: Any, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    ran = run(
        "generate", bundle.photo, "-o", closed / "new" / "x.safetensors", "--model", bundle.model
    )
    refused(ran, "no permission")


def test_permission_is_asked_before_the_model_is_loaded(
    run: Run, bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    refused(
        run("generate", bundle.photo, "-o", tmp_path / "x.safetensors", "--model", "none"),
        "no permission",
    )


def test_one_broken_lora_does_not_end_a_folder(
    run: Run, bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = generate_folder.generate

    def broken(*args: Any) -> Any:
        weights = make(*args)
        weights.up[0][0] = torch.nan
        return weights

    monkeypatch.setattr(generate_folder, "generate", broken)
    ran = run("generate", "--batch", bundle.subjects, "-o", tmp_path, "--model", bundle.model)
    assert ran.code == 0
    assert "skipped: 'person-0': " in ran.err
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_through_a_real_process(shell: Run, bundle: Any, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    (tmp_path / "bad.png").write_bytes(b"hello")
    ran = shell("generate", tmp_path / "bad.png", "-o", out, "--model", bundle.model)
    refused(ran, "PNG, JPEG or WEBP image was expected")
    assert len(ran.err.splitlines()) == 1
    ran = shell("render", "--prompt", "x", "-o", tmp_path / "x.png", "--base", tmp_path / "none")
    refused(ran, "cannot be loaded")
    ran = shell("generate", bundle.photo, "-o", out, "--model", bundle.model)
    assert (ran.code, ran.err) == (0, "")
    assert out.is_file()
