"""LoRA file tools on files of other trainers: bases, precision and headers."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.layout import UNKNOWN_BASE

RunCommand = Callable[..., Any]
BLOCK = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"
KOHYA_HEADER = {
    "ss_base_model_version": "sd_v1",
    "ss_v2": "False",
    "ss_network_dim": "6",
    "ss_network_alpha": "3.0",
    "ss_network_module": "networks.lora",
}


def write_kohya_file(
    path: Path,
    shapes: dict[str, tuple[int, int]],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **header: str,
) -> dict[str, torch.Tensor]:
    """Write a LoRA of rank 6 and alpha 3 as kohya's trainer does; return ΔW by module."""
    generator = torch.Generator().manual_seed(seed)
    tensors, deltas = {}, {}
    for module, (out_features, in_features) in shapes.items():
        down = 0.1 * torch.randn(6, in_features, generator=generator)
        up = 0.1 * torch.randn(out_features, 6, generator=generator)
        tensors[f"{module}.lora_down.weight"] = down.to(dtype)
        tensors[f"{module}.lora_up.weight"] = up.to(dtype)
        tensors[f"{module}.alpha"] = torch.tensor(3.0).to(dtype)
        deltas[module] = up.to(dtype).double() @ down.to(dtype).double() / 2
    save_file(tensors, path, KOHYA_HEADER | header)
    return deltas


def compute_deltas(path: Path) -> dict[str, torch.Tensor]:
    """ΔW by module of a file in kohya's names, by kohya's formula."""
    tensors = {key: tensor.double() for key, tensor in load_file(path).items()}
    return {
        module: tensors[f"{module}.lora_up.weight"]
        @ tensors[f"{module}.lora_down.weight"]
        * (alpha / len(tensors[f"{module}.lora_down.weight"]))
        for module, alpha in (
            (key.removesuffix(".alpha"), tensor)
            for key, tensor in tensors.items()
            if key.endswith(".alpha")
        )
    }


def read_header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_combine_and_diff_add_loras_of_two_checkpoints_over_all_their_modules(
    run: RunCommand, tmp_path: Path
) -> None:
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "out"))
    deltas_a = write_kohya_file(
        a,
        {f"{BLOCK}_attn1_to_q": (640, 640), f"{BLOCK}_attn2_to_k": (640, 768)},
        1,
        ss_sd_model_name="v1-5-pruned.safetensors",
    )
    deltas_b = write_kohya_file(
        b,
        {f"{BLOCK}_attn1_to_q": (640, 640), f"{BLOCK}_attn1_to_v": (640, 640)},
        2,
        ss_sd_model_name="anime.ckpt",
    )
    for arguments, weight_a, weight_b in (
        (["combine", f"{a}:0.7", f"{b}:0.5"], 0.7, 0.5),
        (["combine", a, f"{b}:-2"], 1.0, -2.0),
        (["diff", a, b], 1.0, -1.0),
    ):
        result = run(*arguments, "-o", out)
        assert result.code == 0, result
        deltas = compute_deltas(out)
        assert deltas.keys() == deltas_a.keys() | deltas_b.keys()
        for module, delta in deltas.items():
            expected = torch.zeros_like(delta)
            expected += weight_a * deltas_a.get(module, torch.zeros_like(delta))
            expected += weight_b * deltas_b.get(module, torch.zeros_like(delta))
            assert (delta - expected).norm() <= 1e-6 * expected.norm(), module
        header = read_header(out)
        assert "hyperlora.base" not in header
        assert "ss_sd_model_name" not in header  # neither of both is the checkpoint of the sum
        assert header["ss_base_model_version"] == "sd_v1"
    assert load_lora(out).weights.layout.base == UNKNOWN_BASE


@pytest.mark.parametrize(
    ("other_shapes", "other_header"),
    [
        ({f"{BLOCK}_attn1_to_q": (640, 640)}, {"ss_base_model_version": "sdxl_base_v1-0"}),
        ({f"{BLOCK}_attn1_to_v": (640, 640)}, {"modelspec.architecture": "flux-1-dev/lora"}),
        ({f"{BLOCK}_attn2_to_v": (640, 2048)}, {"ss_base_model_version": ""}),
        ({f"{BLOCK}_attn1_to_q": (1280, 1280)}, {}),
    ],
    ids=["header", "disjoint", "text width", "shapes"],
)
def test_combine_and_diff_refuse_other_architectures_in_one_sentence(
    run: RunCommand,
    tmp_path: Path,
    other_shapes: dict[str, tuple[int, int]],
    other_header: dict[str, str],
) -> None:
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "out"))
    write_kohya_file(a, {f"{BLOCK}_attn1_to_q": (640, 640)})
    write_kohya_file(b, other_shapes, **other_header)
    for arguments in (["combine", a, b], ["combine", b, a], ["diff", a, b]):
        result = run(*arguments, "-o", out)
        assert (result.code, result.err.count("\n"), out.exists()) == (2, 1, False), result
        assert "combine LoRAs of one" in result.err


@pytest.mark.parametrize("strategy", ["merge", "switch", "composite", "spatial", "gamma"])
def test_render_composes_loras_of_two_checkpoints_in_every_strategy(
    run: RunCommand, bundle: Any, tmp_path: Path, strategy: str
) -> None:
    unet = load_diffusion_base(bundle.base).pipeline.unet
    shapes = {
        f"lora_unet_{path.replace('.', '_')}": tuple(layer.weight.shape)
        for path, layer in unet.named_modules()
        if path.endswith(("attn1.to_q", "attn2.to_v"))
    }
    names = ("first", "second")
    for seed, name in enumerate(names):
        write_kohya_file(
            tmp_path / f"{name}.safetensors", shapes, seed, ss_sd_model_name=f"{name}.ckpt"
        )
    options = {
        "switch": ["--switch-every", 1],
        "spatial": ["--region", "0,0,0.5,1", "--region", "0.5,0,1,1"],
        "gamma": ["--gamma", 1.5],
    }.get(strategy, [])
    if strategy != "gamma":
        options = ["--strategy", strategy, *options]
    images = {}
    for weight in (1, 9):
        out = tmp_path / f"{weight}.png"
        loras = [arg for name in names for arg in ("--lora", tmp_path / f"{name}.safetensors")]
        loras = ["--lora", f"{loras[1]}:{weight}", *loras[2:]]
        result = run(
            *("render", "--base", bundle.base, "--prompt", "x", "--steps", 3, "-o", out),
            *loras,
            *options,
        )
        assert (result.code, "note" in result.err) == (0, False), result
        images[weight] = np.asarray(Image.open(out), int)
    assert np.abs(images[1] - images[9]).max() > 2  # the LoRA acts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tools_keep_the_precision_of_the_file(
    run: RunCommand, tmp_path: Path, dtype: torch.dtype
) -> None:
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "out"))
    for seed, path in enumerate((a, b)):
        write_kohya_file(path, {f"{BLOCK}_attn1_to_q": (48, 40)}, seed, dtype)
    for arguments, factor in (
        (["convert", a], 1),
        (["convert", a, "--format", "diffusers"], 1),
        (["resize", a, "--rank", 3], 0.5),
        (["scale", a, "--factor", 0.5], 1),
        (["combine", a, b], 2),
        (["diff", a, b], 2),
    ):
        assert run(*arguments, "-o", out).code == 0
        tensors = {k: t for k, t in load_file(out).items() if not k.endswith(".alpha")}
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}, arguments
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        assert num_bytes == factor * 6 * (48 + 40) * dtype.itemsize
    part = ["--part", "all=unet"]
    assert run("split", a, "-o", tmp_path / "parts", *part).code == 0
    split_tensors = load_file(tmp_path / "parts" / "all.safetensors")
    assert {t.dtype for k, t in split_tensors.items() if "lora" in k.split(".")[1]} == {dtype}
    assert run("convert", a, "--dtype", "float32", "-o", out).code == 0
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.float32}


def test_combine_takes_the_widest_precision(run: RunCommand, tmp_path: Path) -> None:
    paths = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        paths[dtype] = tmp_path / f"{str(dtype)[6:]}.safetensors"
        write_kohya_file(paths[dtype], {f"{BLOCK}_attn1_to_q": (8, 8)}, 0, dtype)
    out = tmp_path / "out.safetensors"
    for first, second in (
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ):
        assert run("combine", paths[first], paths[second], "-o", out).code == 0
        assert {tensor.dtype for tensor in load_file(out).values()} == {torch.float32}


def test_tools_write_headers_of_the_new_file(run: RunCommand, tmp_path: Path) -> None:
    a, b = tmp_path / "glasses.safetensors", tmp_path / "hat.safetensors"
    stale = {"sshs_model_hash": "ab" * 32, "sshs_legacy_hash": "ab" * 4}
    stale |= {"modelspec.hash_sha256": "0x" + "ab" * 32, "modelspec.date": "2020-01-01"}
    training = {"ss_tag_frequency": '{"1_x": {"x": 3}}', "ss_sd_model_name": "v1.ckpt"}
    for path in (a, b):
        title = {"modelspec.title": path.stem, "ss_output_name": path.stem}
        shapes = {f"{BLOCK}_attn1_to_q": (24, 32), f"{BLOCK}_attn1_to_k": (24, 32)}
        write_kohya_file(path, shapes, **stale, **training, **title)
    for arguments, name, title, rank, keeps_training in (
        (["convert", a], "one", "glasses", 6, True),
        (["convert", a, "--format", "diffusers"], "two", "glasses", 6, True),
        (["resize", a, "--rank", 2], "three", "glasses (rank 2)", 2, True),
        (["scale", a, "--factor", 0.5], "four", "glasses (x0.5)", 6, True),
        (["scale", a, "--block", "unet=2"], "five", "glasses (unet x2)", 6, True),
        (["combine", f"{a}:0.5", b], "six", "0.5 glasses + 1 hat", 12, False),
        (["diff", a, b], "seven", "glasses - hat", 12, False),
    ):
        out = tmp_path / f"{name}.safetensors"
        assert run(*arguments, "-o", out).code == 0
        header, data = read_header(out), out.read_bytes()
        digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
        assert header["sshs_model_hash"] == digest
        assert header["modelspec.hash_sha256"] == f"0x{digest}"
        assert header["sshs_legacy_hash"] == "e3b0c442"  # of nothing: the file is below 1 MiB
        assert (header["ss_output_name"], header["modelspec.title"]) == (name, title)
        assert (header["ss_network_dim"], float(header["ss_network_alpha"])) == (str(rank), rank)
        assert header["modelspec.date"] != "2020-01-01"
        assert (training.items() <= header.items()) == keeps_training
        assert ("modelspec.merged_from" in header) != keeps_training
    assert run("split", a, "-o", tmp_path, "--part", "eight=unet").code == 0
    header = read_header(tmp_path / "eight.safetensors")
    assert (header["ss_output_name"], header["modelspec.title"]) == ("eight", "glasses (eight)")
    assert header["sshs_model_hash"] != "ab" * 32


def test_convert_leaves_no_file_that_it_cannot_read_back(run: RunCommand, tmp_path: Path) -> None:
    a, out = tmp_path / "a.safetensors", tmp_path / "new" / "out.safetensors"
    module = (
        "unet.mid_block" + ".attentions.0" * 20 + ".proj_in"
    )  # 296 letters as read, 304 as kohya
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 3)}
    save_file(tensors | {f"{module}.lora_B.weight": torch.ones(3, 2)}, a)
    result = run("convert", a, "--format", "kohya", "-o", out)
    assert (result.code, result.err.count("\n")) == (2, 1), result
    assert not out.parent.exists()
