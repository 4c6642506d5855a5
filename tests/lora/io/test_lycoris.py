"""LoHa, LoKr and Tucker LoCon become plain LoRAs: ΔW equals LyCORIS' formulas and PEFT's layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from hyperlora.cli import app
from hyperlora.errors import InvalidLoraFileError
from hyperlora.lora.io.load import load_lora
from tests.tiny_pipelines import get_tiny_pipeline

LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_mid_block_resnets_0_conv1"


def rand(*sizes: int) -> Tensor:
    return torch.randn(*sizes)


def rebuild_tucker(core: Tensor, wa: Tensor, wb: Tensor) -> Tensor:
    """LyCORIS' ``rebuild_tucker``."""
    return torch.einsum("i j ..., i p, j r -> p r ...", core, wa, wb)


def make_tucker(r: int) -> tuple[str, dict[str, Tensor], Tensor, int]:
    down, mid, up = rand(r, 6, 1, 1), rand(r, r, 3, 3), rand(10, r, 1, 1)
    state = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    delta = rebuild_tucker(mid.double(), up.double().flatten(1).T, down.double().flatten(1))
    return CONV, state, delta * 2 / r, r


def make_loha(r: int) -> tuple[str, dict[str, Tensor], Tensor, int]:
    a1, b1, a2, b2 = rand(10, r), rand(r, 6), rand(10, r), rand(r, 6)
    state = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    delta = (a1.double() @ b1.double()) * (a2.double() @ b2.double())
    return LINEAR, state, delta * 2 / r, r**2


def make_conv_loha(r: int) -> tuple[str, dict[str, Tensor], Tensor, int]:
    a1, b1, a2, b2 = rand(10, r), rand(r, 6 * 9), rand(10, r), rand(r, 6 * 9)
    state = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    delta = (a1.double() @ b1.double()) * (a2.double() @ b2.double())
    return CONV, state, delta.reshape(10, 6, 3, 3) * 2 / r, r**2


def make_tucker_loha(r: int) -> tuple[str, dict[str, Tensor], Tensor, int]:
    t1, a1, b1 = rand(r, r, 3, 3), rand(r, 10), rand(r, 6)
    t2, a2, b2 = rand(r, r, 3, 3), rand(r, 10), rand(r, 6)
    names = ("t1", "w1_a", "w1_b", "t2", "w2_a", "w2_b")
    state = {f"hada_{n}": t for n, t in zip(names, (t1, a1, b1, t2, a2, b2), strict=True)}
    first = rebuild_tucker(t1.double(), a1.double(), b1.double())
    second = rebuild_tucker(t2.double(), a2.double(), b2.double())
    return CONV, state, first * second * 2 / r, r**2


def make_lokr(r: int) -> tuple[str, dict[str, Tensor], Tensor, int]:
    w1, a, b = rand(2, 3), rand(5, r), rand(r, 4)
    state = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}
    return LINEAR, state, torch.kron(w1.double(), a.double() @ b.double()) * 2 / r, 2 * r


def make_lokr_of_four(r: int) -> tuple[str, dict[str, Tensor], Tensor, int]:
    a1, b1, a2, b2 = rand(6, r), rand(r, 5), rand(7, r), rand(r, 4)
    state = {"lokr_w1_a": a1, "lokr_w1_b": b1, "lokr_w2_a": a2, "lokr_w2_b": b2}
    delta = torch.kron(a1.double() @ b1.double(), a2.double() @ b2.double())
    return LINEAR, state, delta * 2 / r, r**2


def make_half_lokr(r: int) -> tuple[str, dict[str, Tensor], Tensor, int]:
    a1, b1, w2 = rand(6, r), rand(r, 5), rand(3, 4)
    state = {"lokr_w1_a": a1, "lokr_w1_b": b1, "lokr_w2": w2}
    return LINEAR, state, torch.kron(a1.double() @ b1.double(), w2.double()) * 2 / r, 3 * r


def make_full_lokr(r: int) -> tuple[str, dict[str, Tensor], Tensor, int]:
    """Two whole matrices, the second of rank r: alpha has no effect."""
    w1 = rand(2, 3)
    # integers, so that the rank is exact
    w2 = torch.randint(-3, 4, (5, r)).float() @ torch.randint(-3, 4, (r, 4)).float()
    rank = int(torch.linalg.matrix_rank(w1) * torch.linalg.matrix_rank(w2))
    return LINEAR, {"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1.double(), w2.double()), rank


def make_conv_lokr(r: int) -> tuple[str, dict[str, Tensor], Tensor, int]:
    w1, a, b = rand(2, 3), rand(5, r), rand(r, 2, 3, 3)
    state = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}
    w2 = (a.double() @ b.double().flatten(1)).reshape(5, 2, 3, 3)
    return CONV, state, torch.kron(w1.double()[..., None, None], w2) * 2 / r, 2 * r


def make_tucker_lokr(r: int) -> tuple[str, dict[str, Tensor], Tensor, int]:
    w1, core, a, b = rand(2, 3), rand(r, r, 3, 3), rand(r, 5), rand(r, 2)
    state = {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
    w2 = rebuild_tucker(core.double(), a.double(), b.double()).contiguous()
    return CONV, state, torch.kron(w1.double()[..., None, None], w2) * 2 / r, 2 * r


KINDS = {
    function.__name__.removeprefix("make_"): function
    for function in (
        make_tucker,
        make_loha,
        make_conv_loha,
        make_tucker_loha,
        make_lokr,
        make_lokr_of_four,
        make_half_lokr,
        make_full_lokr,
        make_conv_lokr,
        make_tucker_lokr,
    )
}


@pytest.mark.parametrize("r", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_load_lora_reads_lycoris_exactly(kind: str, r: int, tmp_path: Path) -> None:
    torch.manual_seed(r)
    stem, tensors, delta, rank = KINDS[kind](r)
    state = {f"{stem}.{name}": tensor for name, tensor in tensors.items()}
    save_file(state | {f"{stem}.alpha": torch.tensor(2.0)}, tmp_path / "x.safetensors")
    file = load_lora(tmp_path / "x.safetensors")
    (target,) = file.weights.layout.targets
    assert target.kernel_size == ((3, 3) if delta.ndim == 4 else None)
    assert file.ranks == (rank,)
    (loaded,) = file.weights.get_delta_weights()
    error = torch.linalg.norm(loaded.double() - delta.flatten(1)) / torch.linalg.norm(delta)
    assert error < 1e-6


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", KINDS)
def test_convert_writes_lycoris_as_plain_lora(kind: str, format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    stem, tensors, delta, _ = KINDS[kind](2)
    state = {f"{stem}.{name}": tensor for name, tensor in tensors.items()}
    save_file(state | {f"{stem}.alpha": torch.tensor(2.0)}, tmp_path / "x.safetensors")
    output = tmp_path / "plain.safetensors"
    arguments = ["convert", str(tmp_path / "x.safetensors"), "-o", str(output), "--format", format]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    plain = load_file(output)
    (down_key,) = [key for key in plain if key.endswith(("lora_down.weight", "lora_A.weight"))]
    (up_key,) = [key for key in plain if key.endswith(("lora_up.weight", "lora_B.weight"))]
    down, up = plain[down_key], plain[up_key]
    product = up.double().flatten(1) @ down.double().flatten(1)
    error = torch.linalg.norm(product - delta.flatten(1)) / torch.linalg.norm(delta)
    assert error < 1e-6


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr both", "lokr full"])
def test_load_lora_reads_folders_of_pefts_lycoris(kind: str, tmp_path: Path) -> None:
    from peft import LoHaConfig, LoKrConfig, get_peft_model

    class Block(nn.Module):
        """With paths of a UNet."""

        def __init__(self) -> None:
            super().__init__()
            self.mid_block = nn.ModuleDict({"to_q": nn.Linear(24, 36)})

    options: dict[str, Any] = {"r": 2, "alpha": 5, "target_modules": ["to_q"]}
    config = {
        "loha": LoHaConfig(**options),
        "lokr": LoKrConfig(**options),
        "lokr both": LoKrConfig(**options | {"decompose_both": True, "decompose_factor": 6}),
        "lokr full": LoKrConfig(**options | {"r": 40}),
    }[kind]
    torch.manual_seed(0)
    model = get_peft_model(Block(), config)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(str(tmp_path))
    layer = model.base_model.model.mid_block["to_q"]
    (delta,) = load_lora(tmp_path).weights.get_delta_weights()
    torch.testing.assert_close(delta, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-5)


def test_load_lora_fits_kernels_to_the_base(tmp_path: Path) -> None:
    """LoHa of a convolution is a matrix, and Linear layers were once 1x1 convolutions."""
    unet = get_tiny_pipeline("stable_diffusion").denoiser
    conv = unet.get_submodule("mid_block.resnets.0.conv1").weight
    linear = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q").weight
    out_channels, in_channels = conv.shape[:2]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    sizes = [(out_channels, 1), (1, in_channels * 9)] * 2
    state = {f"{CONV}.{n}": rand(*size) for n, size in zip(names, sizes, strict=True)}
    state[f"{LINEAR}.lora_down.weight"] = rand(2, linear.shape[1], 1, 1)
    state[f"{LINEAR}.lora_up.weight"] = rand(linear.shape[0], 2, 1, 1)
    save_file(state, tmp_path / "x.safetensors")
    file = load_lora(tmp_path / "x.safetensors", modules={"unet": unet})
    kernels = {target.path: target.kernel_size for target in file.weights.layout.targets}
    assert sorted(kernels.values(), key=str) == [(3, 3), None]


def test_load_lora_limits_what_lycoris_unfolds_to(tmp_path: Path) -> None:
    w1, w2 = rand(64, 64), rand(64, 64)
    save_file({f"{LINEAR}.lokr_w1": w1, f"{LINEAR}.lokr_w2": w2}, tmp_path / "x.safetensors")
    with pytest.raises(InvalidLoraFileError, match="unfold to 33,554,432 numbers"):
        load_lora(tmp_path / "x.safetensors", max_parameters=1 << 20)


def test_load_lora_splits_fused_lokr(tmp_path: Path) -> None:
    w1, w2 = rand(6, 4), rand(8, 4)
    stem = "diffusion_model.double_blocks.3.img_attn.qkv"
    save_file({f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2}, tmp_path / "x.safetensors")
    file = load_lora(tmp_path / "x.safetensors")
    deltas = dict(
        zip(
            (target.path.rsplit("_", 1)[1] for target in file.weights.layout.targets),
            file.weights.get_delta_weights(),
            strict=True,
        )
    )
    for name, rows in zip("qkv", torch.kron(w1, w2).chunk(3), strict=True):
        torch.testing.assert_close(deltas[name], rows, rtol=1e-5, atol=1e-5)


def test_inspect_shows_what_was_left_out(tmp_path: Path) -> None:
    state = {f"{LINEAR}.lora_down.weight": rand(2, 3), f"{LINEAR}.lora_up.weight": rand(4, 2)}
    state |= {"bundle_emb.my name.clip_l": rand(2, 2), "global_step": torch.ones(1).long()}
    state["text_encoder.text_model.embeddings.token_embedding.weight"] = rand(2, 2)
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    result = CliRunner().invoke(app, ["inspect", str(path), "--json"])
    (note,) = json.loads(result.output)["notes"]
    assert note.startswith("left out 3 keys that belong to no LoRA: 'bundle_emb.my name.clip_l'")
    output = tmp_path / "y.safetensors"
    result = CliRunner().invoke(app, ["convert", str(path), "-o", str(output)])
    assert result.exit_code == 0
    assert note in result.stderr
