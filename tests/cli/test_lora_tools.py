"""LoRA file tools, and LoRAs named in a prompt."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hyperlora.diffusion.lora_prompt_syntax import LoraTag, parse_lora_tags
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.find import find_lora
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.merge import compute_relative_error, merge
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora import ImageToLora
from tests.lora.io import unet_bases

RunCommand = Callable[..., Any]


@pytest.fixture
def lora_dir(bundle: Any, tmp_path: Path) -> Path:
    """Two LoRAs of the tiny bundle, a.safetensors and people/b.safetensors, titled Anna and Ben."""
    model = ImageToLora.from_pretrained(str(bundle.model))
    for i, (name, title) in enumerate((("a", "Anna"), ("people/b", "Ben"))):
        metadata = LoraMetadata(
            title=title,
            trigger_phrase=f"sks {title}",
            license="mit",
            architecture="stable-diffusion-v1",
        )
        lora = model(bundle.subjects / f"person-{i}" / "0.png") * 3.0
        replace(lora, metadata=metadata).save(
            tmp_path / "loras" / f"{name}.safetensors", format=("diffusers", "kohya")[i]
        )
    return tmp_path / "loras"


def load_weights(path: Path) -> LoraWeights:
    return load_lora(path).weights


def test_lora_tools_write_expected_weights(run: RunCommand, lora_dir: Path, tmp_path: Path) -> None:
    a, b = lora_dir / "a.safetensors", lora_dir / "people" / "b.safetensors"
    lora_a, lora_b = load_weights(a), load_weights(b)
    out = tmp_path / "new" / "made.safetensors"
    for arguments, expected, tolerance in (
        (["combine", f"{a}:0.7", f"{b}:-0.5"], merge([lora_a, lora_b], [0.7, -0.5]), 1e-6),
        (
            ["combine", a, b, "--rank", 3, "--method", "svd"],
            merge([lora_a, lora_b], method="svd", rank=3),
            1e-5,
        ),
        (
            ["combine", a, b, "--method", "ties", "--density", 0.4],
            merge([lora_a, lora_b], method="ties", density=0.4),
            1e-5,
        ),
        (["diff", a, b], merge([lora_a, lora_b], [1, -1]), 1e-6),
        (["resize", a, "--rank", 1], lora_a.resize(1), 1e-5),
        (["scale", a, "--factor", -0.5], lora_a * -0.5, 1e-6),
        (["scale", a, "--block", "unet.mid_block=0", "--block", "unet=2"], None, 0),
        (["convert", a, "--format", "kohya"], lora_a, 1e-6),
        (["convert", a, "--dtype", "bfloat16"], lora_a, 2e-2),
    ):
        result = run(*arguments, "-o", out)
        assert result.code == 0, result
        assert "error" in result.out
        if expected is not None:
            assert compute_relative_error(load_weights(out), expected) <= tolerance, arguments
    result = run("scale", a, "--block", "unet.mid_block=0", "-o", out)
    norms = dict(
        zip(
            [s.name for s in load_weights(out).layout.targets],
            load_weights(out).compute_delta_norms().tolist(),
            strict=True,
        )
    )
    assert result.code == 0
    assert {n.startswith("unet.mid_block") for n, norm in norms.items() if norm == 0} == {True}
    assert run("convert", b, "-o", out).code == 0
    assert load_lora(out).format == "kohya"  # of auto


def test_resize_prints_relative_error(run: RunCommand, lora_dir: Path, tmp_path: Path) -> None:
    a, out = lora_dir / "a.safetensors", tmp_path / "small.safetensors"
    message = run("resize", a, "--rank", 1, "-o", out).out
    assert float(message.split("error ")[-1]) == pytest.approx(
        compute_relative_error(load_weights(a).resize(1), load_weights(a)), rel=0.05
    )
    assert float(run("convert", a, "-o", out).out.split("error ")[-1]) < 1e-6


def test_combine_merges_metadata(run: RunCommand, lora_dir: Path, tmp_path: Path) -> None:
    a, b, out = (
        lora_dir / "a.safetensors",
        lora_dir / "people" / "b.safetensors",
        tmp_path / "c.safetensors",
    )
    assert run("combine", f"{a}:0.7", b, "-o", out).code == 0
    metadata = load_lora(out).metadata
    assert (metadata.title, metadata.trigger_phrase, metadata.license) == (
        "0.7 Anna + 1 Ben",
        "sks Anna, sks Ben",
        "mit",
    )
    assert metadata.base_model == load_lora(a).metadata.base_model
    assert len(metadata.reference_sha256) == len(
        {*load_lora(a).metadata.reference_sha256, *load_lora(b).metadata.reference_sha256}
    )


def test_split_writes_one_file_per_part(run: RunCommand, lora_dir: Path, tmp_path: Path) -> None:
    a, out = lora_dir / "a.safetensors", tmp_path / "parts"
    assert (
        run(
            "split",
            a,
            "-o",
            out,
            "--part",
            "down=unet.down_blocks",
            "--part",
            "other=unet.mid_block,unet.up_blocks",
        ).code
        == 0
    )
    parts = [load_weights(out / f"{name}.safetensors") for name in ("down", "other")]
    assert compute_relative_error(merge(parts), load_weights(a)) < 1e-6
    result = run("split", a, "-o", tmp_path / "none")
    assert (result.code, (tmp_path / "none").exists()) == (2, False)
    assert "changes nothing in block 'unet.up_blocks.0.attentions.0'" in result.err


def test_lora_tools_refuse_invalid_input(
    run: RunCommand, lora_dir: Path, bundle: Any, tmp_path: Path
) -> None:
    a, b, out = (
        lora_dir / "a.safetensors",
        lora_dir / "people" / "b.safetensors",
        tmp_path / "x.safetensors",
    )
    lora_a = load_lora(a)
    other_base_lora = LoraWeights(
        lora_a.weights.layout.__class__(lora_a.weights.layout.targets, 2, "another/base"),
        lora_a.weights.down,
        lora_a.weights.up,
    )
    other_base_file = save_lora(other_base_lora, tmp_path / "alien.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(a.read_bytes()[:-40])
    for arguments, sentence in (
        (["combine", a, other_base_file], "for base 'another/base'"),
        (["combine", a, b, "--method", "slerp"], "unknown merge method 'slerp'"),
        (["combine", f"{a}:nan", b], "between -10 and 10"),
        (["combine", a, broken], "broken.safetensors"),
        (["scale", a], "by how much"),
        (["scale", a, "--factor", "nan"], "finite"),
        (["scale", a, "--block", "unet.middle=1"], "did you mean 'unet.mid_block"),
        (["scale", a, "--block", "unet"], "NAME=VALUE expected"),
        (["convert", a, "--format", "onnx"], "unknown LoRA format 'onnx'"),
        (["convert", a, "--dtype", "int8"], "unknown dtype 'int8'"),
        (["split", a, "--part", "../x=unet"], "cannot name a file"),
    ):
        result = run(*arguments, "-o", out)
        assert result.code == 2, result
        assert sentence in result.err
        assert result.err.count("\n") == 1
    assert not out.exists()


def test_parse_lora_tags_reads_weights_and_steps() -> None:
    text, tags = parse_lora_tags(
        "a <lora:me:0.8> portrait, <lora:people/b:0.5:1>, "
        "<lora:c:te=0.2:step=5-15> <lora:d:1:start=0.25>"
    )
    assert text == "a portrait"
    assert tags == (
        LoraTag("me", 0.8, 0.8),
        LoraTag("people/b", 0.5, 1.0),
        LoraTag("c", 0.2, 0.2, 5, 15),
        LoraTag("d", 1.0, 1.0, 0.25),
    )
    assert [tags[2].is_active(s, 20) for s in (4, 5, 14, 15)] == [False, True, True, False]
    assert [tags[3].is_active(s, 20) for s in (4, 5, 19)] == [False, True, True]
    for malformed_text, sentence in (
        ("<lora:>", "names no LoRA"),
        ("<lora:x:heavy>", "a number was expected, got 'heavy'"),
        ("<lora:x:nan>", "between -10 and 10"),
        ("<lora:x:1:2:3>", "3 weights"),
        ("<lora:x:dyn=3>", "unknown parameter 'dyn'"),
        ("a <lora:x", "not closed"),
    ):
        with pytest.raises(InvalidArgumentError, match=sentence):
            parse_lora_tags(malformed_text)


def test_find_lora_matches_path_name_or_title(lora_dir: Path) -> None:
    assert (
        find_lora(lora_dir, "a")
        == find_lora(lora_dir, "a.safetensors")
        == find_lora(lora_dir, "Anna")
        == lora_dir / "a.safetensors"
    )
    assert (
        find_lora(lora_dir, "people/b")
        == find_lora(lora_dir, "Ben")
        == lora_dir / "people" / "b.safetensors"
    )
    (lora_dir / "broken.safetensors").write_bytes(b"not a LoRA")
    with pytest.raises(
        InvalidArgumentError,
        match=r"no LoRA called 'Bne' .* did you mean 'Ben'\?.*not readable: broken",
    ):
        find_lora(lora_dir, "Bne")
    (lora_dir / "b.safetensors").write_bytes((lora_dir / "a.safetensors").read_bytes())
    with pytest.raises(InvalidArgumentError, match="2 LoRAs are called 'b'"):
        find_lora(lora_dir, "b")
    with pytest.raises(InvalidArgumentError, match="no folder"):
        find_lora(lora_dir / "nothing", "a")


def test_render_composes_loras(
    run: RunCommand, lora_dir: Path, bundle: Any, tmp_path: Path
) -> None:
    a, b = lora_dir / "a.safetensors", lora_dir / "people" / "b.safetensors"
    mask = tmp_path / "mask.png"
    Image.new("L", (32, 32), 255).save(mask)
    common_options = ["--base", bundle.base, "--steps", 4, "--seed", 3, "--lora-dir", lora_dir]
    both_loras = ["--lora", a, "--lora", b]
    images: dict[str, np.ndarray] = {}
    for name, prompt, options in (
        ("none", "x", []),
        ("merge", "x", both_loras),
        ("named", "x <lora:Anna> <lora:b>", []),
        ("early", "x <lora:a:1:stop=0.25> <lora:b:1:stop=0.25>", []),
        ("switch", "x", [*both_loras, "--strategy", "switch", "--switch-every", 2]),
        ("composite", "x", [*both_loras, "--strategy", "composite"]),
        (
            "spatial",
            "x",
            [*both_loras, "--strategy", "spatial", "--region", "0,0,0.5,1", "--region", mask],
        ),
        (
            "window",
            "x",
            [
                "--lora",
                a,
                "--strategy",
                "spatial",
                "--region",
                "0,0,0.5,1",
                "--windowed",
                "--width",
                32,
            ],
        ),
        ("gamma", "x", [*both_loras, "--gamma", 1.7]),
        ("gamma 1", "x", [*both_loras, "--gamma", 1]),
    ):
        result = run(
            "render", "--prompt", prompt, "-o", tmp_path / f"{name}.png", *options, *common_options
        )
        assert result.code == 0, result
        images[name] = np.asarray(Image.open(tmp_path / f"{name}.png"), int)
    assert images["window"].shape == (16, 32, 3)
    for name in ("named", "gamma 1"):
        assert np.abs(images["merge"] - images[name]).max() <= 2, name
    different = ["none", "merge", "early", "switch", "composite", "spatial", "gamma"]
    for i, lora_a in enumerate(different):
        for other_base_lora in different[:i]:
            assert np.abs(images[lora_a] - images[other_base_lora]).max() > 2, (
                f"{lora_a} and {other_base_lora} look the same"
            )
    for options, sentence in (
        ([*both_loras, "--strategy", "spatial"], "one region per LoRA"),
        ([*both_loras, "--strategy", "mix"], "unknown strategy 'mix'"),
        ([*both_loras, "--strategy", "switch", "--gamma", 2], "use it with --strategy merge"),
        (["--width", 33], "multiples of 8"),
        (["--region", "a,b"], "neither LEFT,TOP,RIGHT,BOTTOM"),
    ):
        result = run(
            "render", "--prompt", "x", "-o", tmp_path / "bad.png", *options, *common_options
        )
        assert result.code == 2, result
        assert sentence in result.err
    result = run("render", "--prompt", "x <lora:Bne>", "-o", tmp_path / "bad.png", *common_options)
    assert "did you mean 'Ben'" in result.err
    assert not (tmp_path / "bad.png").exists()


def test_tools_keep_the_format_and_name_lost_readers(run: RunCommand, tmp_path: Path) -> None:
    modules = {"unet": unet_bases.make_modules("SDXL")["unet"]}
    layout = make_layout(modules, "attention", 2, "x")
    lora = LoraWeights.unflatten(layout, torch.randn(layout.numel))
    path, out = tmp_path / "xl.safetensors", tmp_path / "out.safetensors"
    save_lora(lora, path)
    commands: list[list[Any]] = [
        ["resize", path, "--rank", 1],
        ["scale", path, "--factor", 2],
        ["diff", path, path],
        ["combine", path, f"{path}:0.5"],
        ["convert", path],
    ]
    for command in commands:
        result = run(*command, "-o", out)
        assert (result.code, result.err) == (0, ""), result
        assert load_lora(out).format == "sgm", command
    assert run("split", path, "--part", "mid=unet.mid_block", "-o", tmp_path / "parts").code == 0
    assert load_lora(tmp_path / "parts" / "mid.safetensors").format == "sgm"
    result = run("convert", path, "--format", "diffusers", "-o", out)
    assert (result.code, load_lora(out).format) == (0, "diffusers")
    assert result.err.startswith("note: A1111 and kohya read nothing of a UNet's LoRA")
    assert result.err.count("\n") == 1
