"""User errors: one sentence on stderr, exit code 2, nothing written."""

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

RunCommand = Callable[..., Any]


def assert_refused(result: Any, sentence: str, code: int = 2) -> None:
    assert result.code == code, result
    assert "Traceback" not in result.err
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.err
    assert sentence in lines[0]
    assert not result.out


def encode_image(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def make_huge_png(side: int = 20_000) -> bytes:
    def make_chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = make_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    pixels = zlib.compress(bytes((side // 8 + 1) * side))
    return b"\x89PNG\r\n\x1a\n" + header + make_chunk(b"IDAT", pixels) + make_chunk(b"IEND", b"")


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 20, 3), np.uint8))
BAD_PHOTOS = {
    "no image": (b"hello", "PNG, JPEG or WEBP image was expected"),
    "empty": (b"", "is empty"),
    "cut off": (encode_image(PHOTO)[:400], "damaged or cut off"),
    "huge": (make_huge_png(), "is 20000×20000, at most 25 megapixels"),
    "PDF": (encode_image(PHOTO, "PDF"), "is a PDF file, which is not read"),
}


@pytest.mark.parametrize("case", BAD_PHOTOS)
def test_generate_refuses_bad_photos(
    run: RunCommand, bundle: Any, tmp_path: Path, case: str
) -> None:
    content, sentence = BAD_PHOTOS[case]
    bad_path, out = tmp_path / "bad.png", tmp_path / "out" / "x.safetensors"
    bad_path.write_bytes(content)
    assert_refused(
        run("generate", bundle.photo, bad_path, "-o", out, "--model", bundle.model), sentence
    )
    assert [p.name for p in tmp_path.iterdir()] == ["bad.png"]


def make_rotated_photo() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode_image(
        PHOTO.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=100, subsampling=0
    )


ODD_PHOTOS = {
    "CMYK": encode_image(PHOTO.convert("CMYK"), "JPEG"),
    "16 bit": encode_image(
        Image.fromarray(np.linspace(0, 65535, 600).reshape(30, 20).astype(np.uint16))
    ),
    "alpha": encode_image(PHOTO.convert("RGBA")),
    "rotated by EXIF": make_rotated_photo(),
}


@pytest.mark.parametrize("case", ODD_PHOTOS)
def test_generate_reads_unusual_photos(
    run: RunCommand, bundle: Any, tmp_path: Path, case: str
) -> None:
    (tmp_path / "odd").write_bytes(ODD_PHOTOS[case])
    result = run(
        "generate", tmp_path / "odd", "-o", tmp_path / "x.safetensors", "--model", bundle.model
    )
    assert result.code == 0, result
    actual = load_lora(
        tmp_path / "x.safetensors", ImageToLora.from_pretrained(str(bundle.model)).layout
    ).weights
    if case != "16 bit":
        expected = ImageToLora.from_pretrained(str(bundle.model))(PHOTO).weights
        tolerance = 1e-6 if case == "alpha" else 0.1
        assert (
            actual - expected
        ).compute_delta_norms().sum() <= tolerance * expected.compute_delta_norms().sum() + 1e-3


def test_commands_refuse_bad_arguments(run: RunCommand, bundle: Any, tmp_path: Path) -> None:
    file, empty = tmp_path / "file", tmp_path / "empty"
    file.write_text("x")
    empty.mkdir()
    photo_arguments, lora = [bundle.photo, "--model", bundle.model], tmp_path / "x.safetensors"
    cases: list[tuple[list[Any], str]] = [
        (["generate", *photo_arguments], "Give -o FILE"),
        (["generate", "-o", lora], "photos of one subject, or --input-dir FOLDER"),
        (["generate", *photo_arguments, "--input-dir", empty, "-o", lora], "not both"),
        (["generate", *photo_arguments, "-o", tmp_path / "x.bin"], "ends in .safetensors"),
        (
            ["generate", *photo_arguments, "-o", file / "x.safetensors"],
            "file' is a file, a folder was expected",
        ),
        (["generate", *photo_arguments, "-o", lora, "--format", "onnx"], "unknown format 'onnx'"),
        (
            ["generate", *photo_arguments, "-o", lora, "--strength", "nan"],
            "strength between -10 and 10",
        ),
        (["generate", *photo_arguments, "-o", lora, "--rank", 100_000], "rank 100000 asked for"),
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
            ["generate", *photo_arguments, "-o", lora, "--refine-steps", 1, "--base", empty],
            "model_index.json expected",
        ),
        (
            ["generate", *photo_arguments, "-o", lora, "--refine-method", "photos"],
            "--refine-steps STEPS) too",
        ),
        (
            ["generate", "--input-dir", empty, "-o", tmp_path / "out", "--model", bundle.model],
            "empty' holds no subject",
        ),
        (
            ["generate", "--input-dir", file, "-o", tmp_path / "out", "--model", bundle.model],
            "file' is a file",
        ),
        (
            ["generate", "--input-dir", empty, "-o", file, "--model", bundle.model],
            "is a file, a folder was expected",
        ),
        (
            ["generate", "--input-dir", empty, "-o", empty / "out", "--model", bundle.model],
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
            [
                "evaluate",
                empty,
                *photo_arguments[1:],
                "--base",
                bundle.base,
                "--evaluator",
                bundle.evaluator,
            ],
            "holds no subject",
        ),
        (
            [
                "evaluate",
                bundle.benchmark,
                *photo_arguments[1:],
                "--base",
                bundle.base,
                "--evaluator",
                empty,
            ],
            "holds no attribute classifier",
        ),
        (
            [
                "evaluate",
                bundle.benchmark,
                *photo_arguments[1:],
                "--base",
                bundle.base,
                "--report-dir",
                file,
            ],
            "is a file",
        ),
    ]
    for arguments, sentence in cases:
        assert_refused(run(*arguments), sentence)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"], arguments
        assert not list(empty.iterdir()), arguments


@pytest.mark.parametrize(
    "options",
    [["--rank", -1], ["--refine-steps", -1], ["--batch-size", 0], ["--rank", "x"], ["--nonsense"]],
)
def test_generate_refuses_options_out_of_range(
    run: RunCommand, bundle: Any, tmp_path: Path, options: list[Any]
) -> None:
    result = run("generate", bundle.photo, "-o", tmp_path / "x.safetensors", *options)
    assert result.code == 2
    assert options[0] in result.err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def lora(bundle: Any, tmp_path: Path) -> Path:
    return ImageToLora.from_pretrained(str(bundle.model))(bundle.photo).save(
        tmp_path / "x.safetensors", format="diffusers"
    )


def test_commands_refuse_bad_loras(
    run: RunCommand, bundle: Any, lora: Path, tmp_path: Path
) -> None:
    tensors = load_file(lora)
    key = next(iter(tensors))
    cases = {
        "NaN": ({**tensors, key: torch.full_like(tensors[key], torch.nan)}, "holds NaN"),
        "climbing": ({**tensors, "../../etc/x.lora_A.weight": torch.ones(2, 2)}, "no module path"),
        "partial": ({k: v for k, v in tensors.items() if k != key}, "but no"),
        "unknown site": (
            {k.replace("attn1", "attn7"): v for k, v in tensors.items()},
            "this base lacks",
        ),
        "another width": (
            {k: v[:, :-1] if k.endswith("lora_A.weight") else v for k, v in tensors.items()},
            "expected",
        ),
    }
    for damaged_tensors, sentence in cases.values():
        save_file({k: v.contiguous() for k, v in damaged_tensors.items()}, lora)
        assert_refused(run("inspect", lora, "--base", bundle.base), sentence)
        out = tmp_path / "x.png"
        assert_refused(
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


def test_commands_refuse_model_of_another_base(
    run: RunCommand, bundle: Any, tmp_path: Path
) -> None:
    other_base = tmp_path / "other" / "base"
    other_base.parent.mkdir()
    shutil.copytree(bundle.base, other_base)
    photo_arguments = [bundle.photo, "-o", tmp_path / "x.safetensors", "--model", bundle.model]
    assert_refused(
        run("generate", *photo_arguments, "--refine-steps", 1, "--base", other_base),
        "this base is 'other/base'",
    )
    models = ["--model", bundle.model, "--base", other_base, "--evaluator", bundle.evaluator]
    assert_refused(run("evaluate", bundle.benchmark, *models), "this base is 'other/base'")


@pytest.mark.parametrize("name", ["config.json", "layout.json", "model.safetensors"])
def test_generate_refuses_damaged_model(
    run: RunCommand, bundle: Any, tmp_path: Path, name: str
) -> None:
    model = shutil.copytree(bundle.model, tmp_path / "model")
    (model / name).write_text("{}")
    out = tmp_path / "x.safetensors"
    assert_refused(
        run("generate", bundle.photo, "-o", out, "--model", model), "damaged ImageToLora model"
    )
    (model / name).write_bytes(b"\xff half")
    assert_refused(
        run("generate", bundle.photo, "-o", out, "--model", model), "damaged ImageToLora model"
    )
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
def test_evaluate_refuses_bad_benchmark(
    run: RunCommand, bundle: Any, tmp_path: Path, prompts: str, sentence: str
) -> None:
    (tmp_path / "subjects").symlink_to(bundle.subjects)
    (tmp_path / "prompts.json").write_text(prompts)
    models = ["--model", bundle.model, "--base", bundle.base, "--evaluator", bundle.evaluator]
    assert_refused(
        run("evaluate", tmp_path, *models, "--report-dir", tmp_path / "report"), sentence
    )
    assert not (tmp_path / "report").exists()


def test_input_dir_without_readable_photo_fails(
    run: RunCommand, bundle: Any, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"x")
    result = run(
        "generate", "--input-dir", tmp_path / "in", "-o", tmp_path / "out", "--model", bundle.model
    )
    assert_refused(result, "no LoRA could be made")
    assert "skipped: " in result.err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["index.jsonl"]


def test_full_disk_exits_with_code_1(
    run: RunCommand, bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_disk_full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", "x.safetensors")

    monkeypatch.setattr(os, "fsync", raise_disk_full)
    result = run(
        "generate", bundle.photo, "-o", tmp_path / "x.safetensors", "--model", bundle.model
    )
    assert_refused(result, "x.safetensors: No space left on device", code=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_generate_refuses_folder_without_permission(
    run: RunCommand, bundle: Any, tmp_path: Path
) -> None:
    read_only_dir = tmp_path / "closed"
    read_only_dir.mkdir(mode=0o500)
    result = run(
        "generate",
        bundle.photo,
        "-o",
        read_only_dir / "new" / "x.safetensors",
        "--model",
        bundle.model,
    )
    assert_refused(result, "no permission")


def test_generate_checks_permission_before_loading_model(
    run: RunCommand, bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    assert_refused(
        run("generate", bundle.photo, "-o", tmp_path / "x.safetensors", "--model", "none"),
        "no permission",
    )


def test_input_dir_skips_broken_lora(
    run: RunCommand, bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_loras = generate_folder.generate_loras

    def generate_broken(*args: Any) -> Any:
        weights = generate_loras(*args)
        weights.up[0][0] = torch.nan
        return weights

    monkeypatch.setattr(generate_folder, "generate_loras", generate_broken)
    result = run(
        "generate", "--input-dir", bundle.subjects, "-o", tmp_path, "--model", bundle.model
    )
    assert result.code == 0
    assert "skipped: 'person-0': " in result.err
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_commands_fail_cleanly_in_real_process(
    run: RunCommand, run_process: RunCommand, bundle: Any, tmp_path: Path
) -> None:
    out = tmp_path / "x.safetensors"
    (tmp_path / "bad.png").write_bytes(b"hello")
    result = run_process("generate", tmp_path / "bad.png", "-o", out, "--model", bundle.model)
    assert_refused(result, "PNG, JPEG or WEBP image was expected")
    assert len(result.err.splitlines()) == 1
    result = run("render", "--prompt", "x", "-o", tmp_path / "x.png", "--base", tmp_path / "none")
    assert_refused(result, "cannot be loaded")
    result = run_process("generate", bundle.photo, "-o", out, "--model", bundle.model)
    assert (result.code, result.err) == (0, "running on cpu, float32\n")
    assert out.is_file()
