"""Arithmetic on LoRA files, as a user does it; and LoRAs named in a prompt."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hyperlora.diffusion.lora_prompt_syntax import LoraTag, parse_lora_tags
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.find import find_lora
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.merge import compute_relative_error, merge
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora import ImageToLora

Run = Callable[..., Any]


@pytest.fixture
def shelf(bundle: Any, tmp_path: Path) -> Path:
    """Two LoRAs of the tiny bundle, a.safetensors and people/b.safetensors, titled Anna and Ben."""
    model = ImageToLora.from_pretrained(str(bundle.model))
    for i, (name, title) in enumerate((("a", "Anna"), ("people/b", "Ben"))):
        header = LoraMetadata(
            title=title,
            trigger_phrase=f"sks {title}",
            license="mit",
            architecture="stable-diffusion-v1",
        )
        lora = model(bundle.subjects / f"person-{i}" / "0.png") * 3.0
        replace(lora, metadata=header).save(
            tmp_path / "shelf" / f"{name}.safetensors", format=("diffusers", "kohya")[i]
        )
    return tmp_path / "shelf"


def weights(path: Path) -> LoraWeights:
    return load_lora(path).weights


def test_algebra(run: Run, shelf: Path, tmp_path: Path) -> None:
    a, b = shelf / "a.safetensors", shelf / "people" / "b.safetensors"
    one, two = weights(a), weights(b)
    out = tmp_path / "new" / "made.safetensors"
    for arguments, expected, tolerance in (
        (["combine", f"{a}:0.7", f"{b}:-0.5"], merge([one, two], [0.7, -0.5]), 1e-6),
        (
            ["combine", a, b, "--rank", 3, "--how", "svd"],
            merge([one, two], method="svd", rank=3),
            1e-5,
        ),
        (
            ["combine", a, b, "--how", "ties", "--density", 0.4],
            merge([one, two], method="ties", density=0.4),
            1e-5,
        ),
        (["diff", a, b], merge([one, two], [1, -1]), 1e-6),
        (["resize", a, "--rank", 1], one.resize(1), 1e-5),
        (["scale", a, "--by", -0.5], one * -0.5, 1e-6),
        (["scale", a, "--block", "unet.mid_block=0", "--block", "unet=2"], None, 0),
        (["convert", a, "--format", "kohya"], one, 1e-6),
        (["convert", a, "--dtype", "bfloat16"], one, 2e-2),
    ):
        ran = run(*arguments, "-o", out)
        assert ran.code == 0, ran
        assert "error" in ran.out
        if expected is not None:
            assert compute_relative_error(weights(out), expected) <= tolerance, arguments
    with_zeros = run("scale", a, "--block", "unet.mid_block=0", "-o", out)
    norms = dict(
        zip(
            [s.name for s in weights(out).layout.targets],
            weights(out).compute_delta_norms().tolist(),
            strict=True,
        )
    )
    assert with_zeros.code == 0
    assert {n.startswith("unet.mid_block") for n, norm in norms.items() if norm == 0} == {True}
    assert run("convert", b, "-o", out).code == 0
    assert load_lora(out).format == "diffusers"


def test_the_error_that_is_printed(run: Run, shelf: Path, tmp_path: Path) -> None:
    a, out = shelf / "a.safetensors", tmp_path / "small.safetensors"
    said = run("resize", a, "--rank", 1, "-o", out).out
    assert float(said.split("error ")[-1]) == pytest.approx(
        compute_relative_error(weights(a).resize(1), weights(a)), rel=0.05
    )
    assert float(run("convert", a, "-o", out).out.split("error ")[-1]) < 1e-6


def test_headers_of_results(run: Run, shelf: Path, tmp_path: Path) -> None:
    a, b, out = (
        shelf / "a.safetensors",
        shelf / "people" / "b.safetensors",
        tmp_path / "c.safetensors",
    )
    assert run("combine", f"{a}:0.7", b, "-o", out).code == 0
    header = load_lora(out).metadata
    assert (header.title, header.trigger_phrase, header.license) == (
        "0.7 Anna + 1 Ben",
        "sks Anna, sks Ben",
        "mit",
    )
    assert header.base_model == load_lora(a).metadata.base_model
    assert len(header.reference_sha256) == len(
        {*load_lora(a).metadata.reference_sha256, *load_lora(b).metadata.reference_sha256}
    )


def test_split(run: Run, shelf: Path, tmp_path: Path) -> None:
    a, out = shelf / "a.safetensors", tmp_path / "parts"
    assert (
        run(
            "split",
            a,
            "-o",
            out,
            "--part",
            "down=unet.down_blocks",
            "--part",
            "rest=unet.mid_block,unet.up_blocks",
        ).code
        == 0
    )
    parts = [weights(out / f"{name}.safetensors") for name in ("down", "rest")]
    assert compute_relative_error(merge(parts), weights(a)) < 1e-6
    ran = run("split", a, "-o", tmp_path / "none")
    assert (ran.code, (tmp_path / "none").exists()) == (2, False)
    assert "changes nothing in block 'unet.up_blocks.0.attentions.0'" in ran.err


def test_bad_algebra(run: Run, shelf: Path, bundle: Any, tmp_path: Path) -> None:
    a, b, out = (
        shelf / "a.safetensors",
        shelf / "people" / "b.safetensors",
        tmp_path / "x.safetensors",
    )
    one = load_lora(a)
    other = LoraWeights(
        one.weights.layout.__class__(one.weights.layout.targets, 2, "another/base"),
        one.weights.down,
        one.weights.up,
    )
    alien = save_lora(other, tmp_path / "alien.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(a.read_bytes()[:-40])
    for arguments, sentence in (
        (["combine", a, alien], "for base 'another/base'"),
        (["combine", a, b, "--how", "slerp"], "unknown way to merge 'slerp'"),
        (["combine", f"{a}:nan", b], "between -10 and 10"),
        (["combine", a, broken], "broken.safetensors"),
        (["scale", a], "by how much"),
        (["scale", a, "--by", "nan"], "finite"),
        (["scale", a, "--block", "unet.middle=1"], "did you mean 'unet.mid_block"),
        (["scale", a, "--block", "unet"], "NAME=VALUE expected"),
        (["convert", a, "--format", "onnx"], "unknown LoRA format 'onnx'"),
        (["convert", a, "--dtype", "int8"], "unknown dtype 'int8'"),
        (["split", a, "--part", "../x=unet"], "cannot name a file"),
    ):
        ran = run(*arguments, "-o", out)
        assert ran.code == 2, ran
        assert sentence in ran.err
        assert ran.err.count("\n") == 1
    assert not out.exists()


def test_mentions() -> None:
    text, found = parse_lora_tags(
        "a <lora:me:0.8> portrait, <lora:people/b:0.5:1>, <lora:c:te=0.2:step=5-15> <lora:d:1:start=0.25>"
    )
    assert text == "a portrait"
    assert found == (
        LoraTag("me", 0.8, 0.8),
        LoraTag("people/b", 0.5, 1.0),
        LoraTag("c", 0.2, 0.2, 5, 15),
        LoraTag("d", 1.0, 1.0, 0.25),
    )
    assert [found[2].is_active(s, 20) for s in (4, 5, 14, 15)] == [False, True, True, False]
    assert [found[3].is_active(s, 20) for s in (4, 5, 19)] == [False, True, True]
    for bad, sentence in (
        ("<lora:>", "names no LoRA"),
        ("<lora:x:heavy>", "a number was expected, got 'heavy'"),
        ("<lora:x:nan>", "between -10 and 10"),
        ("<lora:x:1:2:3>", "3 weights"),
        ("<lora:x:dyn=3>", "unknown parameter 'dyn'"),
        ("a <lora:x", "not closed"),
    ):
        with pytest.raises(InvalidArgumentError, match=sentence):
            parse_lora_tags(bad)


def test_find_lora(shelf: Path) -> None:
    assert (
        find_lora(shelf, "a")
        == find_lora(shelf, "a.safetensors")
        == find_lora(shelf, "Anna")
        == shelf / "a.safetensors"
    )
    assert (
        find_lora(shelf, "people/b")
        == find_lora(shelf, "Ben")
        == shelf / "people" / "b.safetensors"
    )
    (shelf / "broken.safetensors").write_bytes(b"not a LoRA")
    with pytest.raises(
        InvalidArgumentError,
        match=r"no LoRA called 'Bne' .* did you mean 'Ben'\?.*not readable: broken",
    ):
        find_lora(shelf, "Bne")
    (shelf / "b.safetensors").write_bytes((shelf / "a.safetensors").read_bytes())
    with pytest.raises(InvalidArgumentError, match="2 LoRAs are called 'b'"):
        find_lora(shelf, "b")
    with pytest.raises(InvalidArgumentError, match="no folder"):
        find_lora(shelf / "nothing", "a")


def test_render_composes(run: Run, shelf: Path, bundle: Any, tmp_path: Path) -> None:
    a, b = shelf / "a.safetensors", shelf / "people" / "b.safetensors"
    mask = tmp_path / "mask.png"
    Image.new("L", (32, 32), 255).save(mask)
    common = ["--base", bundle.base, "--steps", 4, "--seed", 3, "--lora-dir", shelf]
    both = ["--lora", a, "--lora", b]
    pictures: dict[str, np.ndarray] = {}
    for name, prompt, options in (
        ("none", "x", []),
        ("merge", "x", both),
        ("named", "x <lora:Anna> <lora:b>", []),
        ("early", "x <lora:a:1:stop=0.25> <lora:b:1:stop=0.25>", []),
        ("switch", "x", [*both, "--strategy", "switch", "--every", 2]),
        ("composite", "x", [*both, "--strategy", "composite"]),
        (
            "spatial",
            "x",
            [*both, "--strategy", "spatial", "--region", "0,0,0.5,1", "--region", mask],
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
                "--window",
                "--width",
                32,
            ],
        ),
        ("gamma", "x", [*both, "--gamma", 1.7]),
        ("gamma 1", "x", [*both, "--gamma", 1]),
    ):
        ran = run("render", "--prompt", prompt, "-o", tmp_path / f"{name}.png", *options, *common)
        assert ran.code == 0, ran
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png"), int)
    assert pictures["window"].shape == (16, 32, 3)
    for same in ("named", "gamma 1"):
        assert np.abs(pictures["merge"] - pictures[same]).max() <= 2, same
    different = ["none", "merge", "early", "switch", "composite", "spatial", "gamma"]
    for i, one in enumerate(different):
        for other in different[:i]:
            assert np.abs(pictures[one] - pictures[other]).max() > 2, (
                f"{one} and {other} look the same"
            )
    for options, sentence in (
        ([*both, "--strategy", "spatial"], "one region per LoRA"),
        ([*both, "--strategy", "mix"], "unknown strategy 'mix'"),
        ([*both, "--strategy", "switch", "--gamma", 2], "use it with --strategy merge"),
        (["--width", 33], "multiples of 8"),
        (["--region", "a,b"], "neither LEFT,TOP,RIGHT,BOTTOM"),
    ):
        ran = run("render", "--prompt", "x", "-o", tmp_path / "bad.png", *options, *common)
        assert ran.code == 2, ran
        assert sentence in ran.err
    ran = run("render", "--prompt", "x <lora:Bne>", "-o", tmp_path / "bad.png", *common)
    assert "did you mean 'Ben'" in ran.err
    assert not (tmp_path / "bad.png").exists()
