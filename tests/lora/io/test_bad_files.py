"""Bad files and arguments raise errors of one sentence, and nothing is written."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hyperlora.errors import (
    HyperloraError,
    InvalidArgumentError,
    InvalidLoraFileError,
    LayoutMismatchError,
)
from hyperlora.lora.io import adapter_config, safetensors_file
from hyperlora.lora.io.inspect import inspect_lora
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights

Make = Callable[..., LoraWeights]
Q, K = "unet.mid_block.attentions.0.to_q", "unet.mid_block.attentions.0.to_k"
STEM = "lora_unet_mid_block_attentions_0_proj_in"


def make_pair(
    name: str = Q, rank: int = 2, suffixes: tuple[str, str] = ("lora_A", "lora_B")
) -> dict[str, Tensor]:
    down, up = suffixes
    return {
        f"{name}.{down}.weight": torch.ones(rank, 3),
        f"{name}.{up}.weight": torch.ones(4, rank),
    }


def make_kohya_pair(stem: str = STEM) -> dict[str, Tensor]:
    return make_pair(stem, suffixes=("lora_down", "lora_up"))


def drop_keys(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if part not in key}


BAD_STATES: dict[str, tuple[dict[str, Tensor], str]] = {
    "nan": (
        make_pair() | {f"{Q}.lora_B.weight": torch.full((4, 2), torch.nan)},
        rf"{Q}\.lora_B\.weight .* holds NaN",
    ),
    "infinity": (
        make_pair() | {f"{Q}.lora_A.weight": torch.full((2, 3), torch.inf)},
        "holds NaN or infinity",
    ),
    "climbing name": (make_pair("../../etc/passwd"), r"'\.\./\.\./etc/passwd.* no module path"),
    "empty name part": (make_pair("unet..x"), "no module path"),
    "endless name": (make_pair("unet." + "a" * 400), "no module path"),
    "integer weights": (
        make_pair() | {f"{Q}.lora_A.weight": torch.ones(2, 3, dtype=torch.int8)},
        "has dtype I8",
    ),
    "double weights that float32 lacks": (
        make_pair() | {f"{Q}.lora_A.weight": torch.full((2, 3), 1e300, dtype=torch.float64)},
        "holds NaN or infinity",
    ),
    "float8 NaN": (
        make_pair() | {f"{Q}.lora_A.weight": torch.full((2, 3), torch.nan).to(torch.float8_e4m3fn)},
        "holds NaN or infinity",
    ),
    "down without up": (drop_keys(make_pair(), "lora_B") | make_pair(K), rf"down of {Q} but no up"),
    "up without down": (drop_keys(make_pair(), "lora_A") | make_pair(K), rf"up of {Q} but no down"),
    "alpha alone": (
        make_kohya_pair() | {"lora_unet_conv_in.alpha": torch.tensor(1.0)},
        "alpha of lora_unet_conv_in but no down",
    ),
    "ranks differ": (
        make_pair() | {f"{Q}.lora_B.weight": torch.ones(4, 5)},
        "ranks 2 and 5 differ inside the pair",
    ),
    "a vector": (make_pair() | {f"{Q}.lora_B.weight": torch.ones(4)}, "no Linear or convolution"),
    "no numbers": (make_pair(rank=0), "no Linear or convolution"),
    "conv with linear": (
        make_pair() | {f"{Q}.lora_A.weight": torch.ones(2, 3, 3, 3)},
        "no Linear or convolution",
    ),
    "wide up kernel": (
        {
            f"{Q}.lora_A.weight": torch.ones(2, 3, 3, 3),
            f"{Q}.lora_B.weight": torch.ones(4, 2, 3, 3),
        },
        "no Linear or convolution",
    ),
    "unknown key": (
        make_pair() | {"unet.conv_in.weight": torch.ones(2)},
        r"has a tensor which belongs to no LoRA \(key unet.conv_in.weight\)",
    ),
    "bias": (make_pair() | {f"{Q}.lora_B.bias": torch.ones(4)}, "has LoRAs with biases"),
    "difference of biases": (
        make_kohya_pair() | {f"{STEM}.diff_b": torch.ones(4)},
        r"changes biases \(key lora_unet.*diff_b\)",
    ),
    "difference of a norm": (
        make_kohya_pair() | {"lora_unet_mid_block_attentions_0_norm.diff": torch.ones(4)},
        "changes whole weights, e.g. of norms",
    ),
    "LyCORIS norm": (
        make_kohya_pair() | {"lora_unet_mid_block_attentions_0_norm.w_norm": torch.ones(4)},
        "changes whole weights",
    ),
    "OFT": (make_kohya_pair() | {f"{STEM}.oft_blocks": torch.ones(4)}, "is OFT"),
    "embeddings' LoRA": (
        make_pair() | {"text_encoder.x.lora_embedding_A": torch.ones(4)},
        "has LoRAs of embeddings",
    ),
    "nothing of a LoRA": ({"global_step": torch.ones(1)}, "holds no LoRA.*'global_step'"),
    "unknown component": (
        make_pair("vae.decoder.x"),
        "LoRA under vae.decoder.x, which names no module of a known base",
    ),
    "path of no base": (make_pair("base_model.model.x"), "names no module of a known base"),
    "one target twice": (
        make_pair("unet.mid_block.attn1.to_q") | make_pair("unet.mid_block.attn1.processor.to_q"),
        "two keys for down of unet.mid_block.attn1.to_q",
    ),
    "DoRA": (make_pair() | {f"{Q}.lora_magnitude_vector": torch.ones(4)}, "is DoRA"),
    "DoRA of kohya": (make_kohya_pair() | {f"{STEM}.dora_scale": torch.ones(4)}, "is DoRA"),
    "half a LoHa": ({f"{STEM}.hada_w1_a": torch.ones(2, 2)}, "hada_w1_a of lora_unet.*no other"),
    "half a LoKr": ({f"{STEM}.lokr_w1": torch.ones(2, 2)}, "lokr_w1 of lora_unet.*no other half"),
    "LoKr of two ranks": (
        {
            f"{STEM}.lokr_w1": torch.ones(2, 2),
            f"{STEM}.lokr_w2_a": torch.ones(4, 3),
            f"{STEM}.lokr_w2_b": torch.ones(2, 4),
        },
        "which do not fit each other",
    ),
    "LoHa of two sizes": (
        {
            f"{STEM}.hada_w1_a": torch.ones(4, 2),
            f"{STEM}.hada_w1_b": torch.ones(2, 5),
            f"{STEM}.hada_w2_a": torch.ones(4, 2),
            f"{STEM}.hada_w2_b": torch.ones(2, 6),
        },
        "which do not fit each other",
    ),
    "kohya without up": (drop_keys(make_kohya_pair(), "lora_up"), "down of lora_unet.* but no up"),
    "kohya of another model": (
        make_kohya_pair("lora_unet_double_blocks_0_img_attn_who"),
        "double_blocks_0.*names no module of a known base",
    ),
    "kohya bad block number": (
        make_kohya_pair("lora_unet_input_blocks_x_1_proj_in"),
        "names no module",
    ),
    "one kohya target twice": (
        make_kohya_pair("lora_te_text_model_encoder_layers_0_mlp_fc1")
        | make_kohya_pair("lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        "two LoRAs for target text_encoder.text_model",
    ),
    "alpha of many numbers": (
        make_kohya_pair() | {f"{STEM}.alpha": torch.ones(2)},
        "not one number",
    ),
    "alpha is NaN": (make_kohya_pair() | {f"{STEM}.alpha": torch.tensor(torch.nan)}, "holds NaN"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_load_lora_refuses_bad_tensors(case: str, tmp_path: Path) -> None:
    state, sentence = BAD_STATES[case]
    save_file(state, tmp_path / "bad.safetensors")
    for read in (load_lora, inspect_lora):
        with pytest.raises(InvalidLoraFileError, match=sentence) as caught:
            read(tmp_path / "bad.safetensors")
        assert "\n" not in str(caught.value)


def test_load_lora_accepts_the_states_behind_the_bad_ones(tmp_path: Path) -> None:
    for state in (
        make_pair(),
        make_kohya_pair(),
        make_kohya_pair() | {f"{STEM}.alpha": torch.tensor(1.0)},
    ):
        save_file(state, tmp_path / "good.safetensors")
        assert load_lora(tmp_path / "good.safetensors").weights.layout.base == "unknown"


BAD_CONFIGS = {
    "no JSON": ("{", "no JSON"),
    "no table": ("[1]", "no table"),
    "DoRA": ({"unet.r": 2, "unet.lora_alpha": 2, "unet.use_dora": True}, "is DoRA"),
    "another rank": (
        {"unet.r": 8, "unet.lora_alpha": 8},
        "has rank 2, its lora_adapter_metadata says 8",
    ),
    "alpha is text": ({"unet.r": 2, "unet.lora_alpha": "two"}, "no sound lora_alpha"),
    "alpha is infinite": ({"unet.r": 2, "unet.lora_alpha": 1e999}, "no sound lora_alpha"),
    "no rank": ({"unet.lora_alpha": 2}, "no sound r "),
    "pattern is a list": (
        {"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": [1]},
        "alpha_pattern",
    ),
    "pattern is no expression": (
        {"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {"(to_q": 1}},
        "'\\(to_q' in its alpha_pattern, which is no regular expression",
    ),
    "pattern takes forever": (
        {
            "unet.r": 2,
            "unet.lora_alpha": 2,
            "unet.alpha_pattern": {r"(\w|\w\w|\w\w\w|\.|\w\.)*[A-Z]": 1},
        },
        "alpha_pattern that takes longer than",
    ),
    "too many expressions": (
        {"unet.r": 2, "unet.rank_pattern": {f"to_[qk]{i}": 2 for i in range(300)}},
        "300 of them regular expressions",
    ),
    "too many names": (
        {"unet.rank_pattern": {f"to_q{i}": 2 for i in range(5001)}},
        "5001 patterns of up to 8 characters",
    ),
    "many names for several components": (
        {f"x{i}.alpha_pattern": {f"a{j}": 2 for j in range(90)} for i in range(60)},
        "5400 patterns of up to 3 characters",
    ),
    "endless pattern": (
        {"unet.r": 2, "unet.rank_pattern": {"to_q|" * 200: 2}},
        "patterns of up to 1000 characters",
    ),
    "PiSSA": (
        {"unet.r": 2, "unet.lora_alpha": 2, "unet.init_lora_weights": "pissa"},
        "changes the base, too",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_load_lora_refuses_bad_adapter_metadata(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_config, "MATCH_TIMEOUT_S", 0.2)
    config, sentence = BAD_CONFIGS[case]
    text = config if isinstance(config, str) else json.dumps(config)
    save_file(make_pair(), tmp_path / "bad.safetensors", metadata={"lora_adapter_metadata": text})
    with pytest.raises(InvalidLoraFileError, match=sentence):
        load_lora(tmp_path / "bad.safetensors")


def make_file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
TYPES_ENTRY = ENTRY.replace('"F32"', '["F32"]')
TABLE_ENTRY = ENTRY.replace('"F32"', "{}")
BAD_BYTES = {
    "empty": (b"", "not a safetensors file"),
    "pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00", "a zip archive or a pickle"),
    "zip": (b"PK\x03\x04" + b"x" * 60, "a zip archive or a pickle"),
    "web page": (b"\n<!DOCTYPE html><html><body>Log in</body></html>", "is a web page"),
    "bare web page": (b"<HTML><title>404</title></HTML>", "is a web page"),
    "LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "is a git-LFS pointer.*git lfs pull",
    ),
    "answer in JSON": (b'{"error": "not found", "code": 404}', "is JSON, not a LoRA"),
    "header longer than the file": (struct.pack("<Q", 1 << 40) + b"{}", "header claims"),
    "no JSON": (make_file(b"nonsense"), "no JSON"),
    "deep JSON": (make_file(b"[" * 100_000), "no JSON"),
    "a list": (make_file(b"[1, 2]"), "no table"),
    "no tensors": (make_file(b"{}"), "holds 0 tensors"),
    "a key twice": (
        make_file(f'{{"a.alpha":{ENTRY},"a.alpha":{ENTRY}}}'.encode(), b"\0" * 4),
        "key 'a.alpha' twice",
    ),
    "offsets outside": (
        make_file(f'{{"a.alpha":{ENTRY}}}'.encode()),
        "not a sound safetensors file",
    ),
    "types in a list": (
        make_file(f'{{"a.alpha":{TYPES_ENTRY}}}'.encode(), b"\0" * 4),
        r"dtype \['F32'\], expected one of",
    ),
    "a table as type": (
        make_file(f'{{"a.alpha":{TABLE_ENTRY}}}'.encode(), b"\0" * 4),
        "dtype {}, expected one of",
    ),
    "endless bystander": (
        make_file(f'{{"a.alpha":{ENTRY},"{"module." * 9999}":{ENTRY}}}'.encode(), b"\0" * 4),
        "tensor named 'module.module",
    ),
    "metadata of numbers": (make_file(b'{"__metadata__":{"a":1}}'), "table of strings"),
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_load_lora_refuses_bad_bytes(case: str, tmp_path: Path) -> None:
    content, sentence = BAD_BYTES[case]
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(InvalidLoraFileError, match=sentence):
        load_lora(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(("dtype", "num_bytes"), [("F4", 4), ("F6_E2M3", 6), ("F8_E8M0", 8)])
def test_load_lora_refuses_types_that_torch_lacks(dtype: str, num_bytes: int) -> None:
    bystander = f'{{"dtype":"{dtype}","shape":[8],"data_offsets":[4,{4 + num_bytes}]}}'
    file = make_file(f'{{"a.alpha":{ENTRY},"b":{bystander}}}'.encode(), bytes(4 + num_bytes))
    with pytest.raises(InvalidLoraFileError):
        load_lora(file)


def test_load_lora_refuses_other_suffixes(tmp_path: Path) -> None:
    torch.save(make_pair(), tmp_path / "evil.bin")
    with pytest.raises(InvalidLoraFileError, match="never opened"):
        load_lora(tmp_path / "evil.bin")
    with pytest.raises(InvalidLoraFileError, match="there is no file"):
        load_lora(tmp_path / "none.safetensors")


def test_load_lora_limits_size_and_number_of_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(make_pair() | make_pair(K), tmp_path / "x.safetensors")
    monkeypatch.setattr(safetensors_file, "MAX_TENSORS", 3)
    with pytest.raises(InvalidLoraFileError, match="holds 4 tensors, expected 1 to 3"):
        load_lora(tmp_path / "x.safetensors")
    monkeypatch.setattr(safetensors_file, "MAX_BYTES", 100)
    with pytest.raises(InvalidLoraFileError, match="GiB are read"):
        load_lora(tmp_path / "x.safetensors")


def test_load_lora_limits_padded_size(tmp_path: Path) -> None:
    save_file(make_pair(rank=50), tmp_path / "x.safetensors")
    with pytest.raises(InvalidLoraFileError, match="350 numbers at rank 50: too many"):
        load_lora(tmp_path / "x.safetensors", max_parameters=349)
    assert load_lora(tmp_path / "x.safetensors", max_parameters=350).weights.layout.rank == 50


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_load_lora_refuses_another_layout_with_both_counts(
    modules: dict[str, nn.Module], random_lora: Make, tmp_path: Path, format: Any
) -> None:
    lora = random_lora({"unet": modules["unet"]}, "attention")
    n, path = len(lora.layout.targets), save_lora(lora, tmp_path / "x.safetensors", format=format)
    larger_layout = random_lora(modules, "attention").layout
    sentence = (
        rf"base 'tiny/base', {n} targets\) has {n} of the {n + 8} targets expected "
        rf"for base 'tiny/base' and 0 others"
    )
    with pytest.raises(LayoutMismatchError, match=sentence):
        load_lora(path, larger_layout)
    foreign_layout = LoraLayout((TargetModule("unet.elsewhere", 3, 4),), 2, "other/base")
    with pytest.raises(
        LayoutMismatchError,
        match=rf"has 0 of the 1 targets expected for base 'other/base' and {n} others",
    ):
        load_lora(path, foreign_layout)
    with pytest.raises(
        LayoutMismatchError, match="for base 'tiny/base', this base is 'other/base'"
    ):
        load_lora(path, replace(lora.layout, base="other/base"))
    wider = replace(lora.layout.targets[0], in_features=99)
    with pytest.raises(LayoutMismatchError, match="99→8 expected"):
        load_lora(path, replace(lora.layout, targets=(wider, *lora.layout.targets[1:])))


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_load_lora_refuses_other_modules(
    pipe: Any, modules: dict[str, nn.Module], random_lora: Make, tmp_path: Path, format: Any
) -> None:
    path = save_lora(random_lora(modules, "attention"), tmp_path / "x.safetensors", format=format)
    with pytest.raises(
        LayoutMismatchError,
        match=r"has 8 targets that this base lacks, e\.g\. text_encoder\..*unet",
    ):
        load_lora(path, modules={"unet": pipe.unet})
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q = nn.Linear(16, 24)
    with pytest.raises(
        LayoutMismatchError, match=r"mid_block.*to_q is 16→16 in the LoRA, 16→24 expected"
    ):
        load_lora(path, modules=modules)
    with pytest.raises(InvalidArgumentError, match="not both"):
        load_lora(path, random_lora(modules).layout, modules)


def fill_first_down(lora: LoraWeights, value: float) -> LoraWeights:
    return LoraWeights(lora.layout, (torch.full_like(lora.down[0], value), *lora.down[1:]), lora.up)


def test_save_lora_refuses_bad_arguments_and_writes_nothing(
    modules: dict[str, nn.Module], random_lora: Make, tmp_path: Path
) -> None:
    lora = random_lora(modules, "attention")
    q_only = LoraLayout(tuple(t for t in lora.layout.targets if t.name.endswith("q_proj")), 3, "b")
    mlp_only = LoraLayout((TargetModule("text_encoder.encoder.layers.0.mlp.fc1", 2, 2),), 3, "b")
    transformer = LoraLayout((TargetModule("transformer.x", 2, 2),), 3, "b")
    clash = LoraLayout((TargetModule("unet.a.b_c", 2, 2), TargetModule("unet.a_b.c", 2, 2)), 3, "b")
    cases: list[tuple[LoraWeights, dict[str, Any], str]] = [
        (LoraWeights.stack([lora, lora]), {}, r"a batch of \[2\]"),
        (fill_first_down(lora, torch.nan), {}, "holds NaN or infinity as torch.float32"),
        (fill_first_down(lora, 1e6), {"dtype": torch.float16}, "or needs float32"),
        (lora, {"dtype": torch.float64}, "not torch.float64"),
        (lora, {"format": "onnx"}, "unknown LoRA format 'onnx'"),
        (
            LoraWeights.zeros(transformer),
            {"format": "kohya"},
            "kohya files hold unet.* not transformer",
        ),
        (LoraWeights.zeros(LoraLayout((TargetModule("vae.x", 2, 2),), 3, "b")), {}, "not vae"),
        (LoraWeights.zeros(clash), {"format": "kohya"}, "one name in kohya's format"),
        (LoraWeights.zeros(q_only), {"format": "kohya"}, "without out_proj"),
        (LoraWeights.zeros(mlp_only), {}, "without out_proj"),
        (lora, {"metadata": LoraMetadata(extra={"ss_v2": "x"})}, "'ss_v2' is reserved"),
    ]
    for weights, arguments, sentence in cases:
        with pytest.raises(HyperloraError, match=sentence):
            save_lora(weights, tmp_path / "folder" / "x.safetensors", **arguments)
    with pytest.raises(InvalidArgumentError, match=r"got x\.bin"):
        save_lora(lora, tmp_path / "x.bin")
    assert list(tmp_path.iterdir()) == []


def test_write_bytes_removes_what_killed_processes_left(tmp_path: Path) -> None:
    digits = "0123456789abcdef" * 2
    stale = [tmp_path / f".{name}.{digits}.tmp" for name in ("x.safetensors", "[y] z\n.json")]
    recent = tmp_path / f".x.safetensors.{digits[::-1]}.tmp"
    others = [tmp_path / name for name in (".notes.tmp", "x.tmp", f"x.{digits}.tmp", ".config")]
    for path in (*stale, recent, *others):
        path.write_bytes(b"half")
    for path in (*stale, *others):
        os.utime(path, (0, 0))
    safetensors_file.write_bytes(b"whole", tmp_path / "x.safetensors")
    assert set(tmp_path.iterdir()) == {tmp_path / "x.safetensors", recent, *others}


def test_save_lora_keeps_the_old_file_if_writing_fails(
    modules: dict[str, nn.Module],
    random_lora: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = (random_lora(modules, seed=seed) for seed in (0, 1))
    path = save_lora(old, tmp_path / "x.safetensors")

    def fail_with_full_disk(descriptor: int) -> None:
        os.truncate(descriptor, 100)
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail_with_full_disk)
    with pytest.raises(OSError, match="disk full"):
        save_lora(new, path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert torch.equal(load_lora(path, old.layout).weights.flatten(), old.flatten())
