"""PEFT's folders and patterns give the ΔW of PEFT; precisions and large headers are read."""

import json
from pathlib import Path
from time import monotonic, process_time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn

from hyperlora.errors import InvalidLoraFileError
from hyperlora.lora.io.adapter_config import parse_header_config
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.pattern_table import PatternTable
from hyperlora.lora.io.safetensors_file import MAX_UPLOAD_HEADER_BYTES
from tests.tiny_pipelines.unets import make_stable_diffusion

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."
EXPRESSIONS = [
    r"down_blocks\.0\..*attn1\.to_k",
    "attn2.to_k",
    "to_k",
    "^mid_block.*",
    r"attn[12]\.to_(q|v)",
    r"(?:down|up)_blocks\.\d+\..*",
    "to_q|to_k",
    "k",
    r".*\.to_out\.0",
    "attn1.to.k",
    "mid.block.attentions.0.proj.in",
    "^mid_block.attentions.0.proj_in",
    "^attentions.0.proj_in$",
    "conv1$",
    "^....................",
]
PATHS = [
    f"{BLOCK}attn1.to_k",
    f"{BLOCK}attn2.to_k",
    f"{BLOCK}attn1.to_q",
    "mid_block.attentions.0.proj_in",
    "up_blocks.1.resnets.0.conv1",
    f"{BLOCK}attn2.to_out.0",
]


@given(patterns=st.lists(st.sampled_from(EXPRESSIONS), max_size=4, unique=True))
def test_compute_scale_matches_patterns_as_peft(patterns: list[str]) -> None:
    ranks = {pattern: 10 + i for i, pattern in enumerate(patterns)}
    alphas = {pattern: 20 + i for i, pattern in enumerate(reversed(patterns))}
    fields = {"r": 4, "lora_alpha": 3, "rank_pattern": ranks, "alpha_pattern": alphas}
    text = json.dumps({f"unet.{field}": value for field, value in fields.items()})
    config = parse_header_config({"lora_adapter_metadata": text}, "x")
    for path in PATHS:
        rank = ranks.get(get_pattern_key(ranks, path), 4)
        alpha = alphas.get(get_pattern_key(alphas, path), 3)
        assert config.compute_scale("unet", path, rank, True) == alpha / rank


def test_find_takes_no_longer_with_more_names() -> None:
    names = [f"{BLOCK.replace('0', str(i))}attn{i % 9}.to_{j}" for i in range(450) for j in "kqvo"]
    start_s = process_time()
    table = PatternTable(names, "rank_pattern", "x")
    for name in names:
        assert table.find(f"unet.{name}", monotonic() + 9) == name
    assert process_time() - start_s < 1  # one expression for each took 8 s


def make_peft_unet(**options: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["to_q", "to_k", "conv1"], **options)
    model: Any = get_peft_model(make_stable_diffusion().pipe.unet, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


CONFIGS: dict[str, dict[str, Any]] = {
    "alpha": {"r": 4, "lora_alpha": 8},
    "rsLoRA": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {r".*attn1\.to_k": 2, "conv1": 3},
        "alpha_pattern": {r"(down|up)_blocks\..*to_q": 1, r"mid_block\..*": 9},
    },
    "rsLoRA with patterns": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {r".*attn1\.to_k": 2},
    },
}


@pytest.mark.parametrize("case", CONFIGS)
def test_load_lora_reads_folders_of_peft(case: str, tmp_path: Path) -> None:
    model = make_peft_unet(**CONFIGS[case])
    model.save_pretrained(str(tmp_path))
    expected = {
        f"unet.{name}": layer.get_delta_weight("default").flatten(1)
        for name, layer in model.base_model.model.named_modules()
        if hasattr(layer, "lora_A") and "default" in layer.lora_A
    }
    unet = make_stable_diffusion().pipe.unet
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        for modules in (None, {"unet": unet}):
            file = load_lora(source, modules=modules)
            names = [target.name for target in file.weights.layout.targets]
            deltas = dict(zip(names, file.weights.get_delta_weights(), strict=True))
            assert deltas.keys() == expected.keys()
            for name, delta in expected.items():
                torch.testing.assert_close(deltas[name], delta, rtol=1e-5, atol=1e-6)
            assert file.notes == ()
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    (note,) = load_lora(data).notes
    assert "adapter_config.json" in note
    assert isinstance(PeftModel.from_pretrained(unet, tmp_path), PeftModel)


def test_load_lora_reads_folders_of_diffusers(tmp_path: Path) -> None:
    pipe = make_stable_diffusion().pipe
    model = make_peft_unet(r=2, lora_alpha=2)
    state = {
        key.removeprefix("base_model.model.").replace(".default", ""): tensor
        for key, tensor in model.state_dict().items()
        if "lora_" in key
    }
    type(pipe).save_lora_weights(tmp_path, unet_lora_layers=state)
    assert len(load_lora(tmp_path).weights.layout.targets) == len(state) // 2


BAD_FOLDERS = {
    "DoRA": ({"use_dora": True}, "is DoRA"),
    "another adapter": ({"peft_type": "OFT"}, "is OFT .peft_type"),
    "no adapter": ({"peft_type": None}, "is None"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "changes the base, too"),
    "biases": ({"lora_bias": True}, "LoRA with biases"),
    "activated LoRA": ({"alora_invocation_tokens": [1]}, "activated LoRA"),
    "another rank": ({"r": 16}, "has rank 4, its adapter_config.json says 16"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_load_lora_refuses_other_folders_of_peft(case: str, tmp_path: Path) -> None:
    fields, sentence = BAD_FOLDERS[case]
    name = "base_model.model.mid_block.attentions.0.proj_in"
    state = {f"{name}.lora_A.weight": torch.ones(4, 3), f"{name}.lora_B.weight": torch.ones(5, 4)}
    save_file(state, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4} | fields
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InvalidLoraFileError, match=sentence):
        load_lora(tmp_path)


def test_load_lora_refuses_folders_without_lora(tmp_path: Path) -> None:
    with pytest.raises(InvalidLoraFileError, match="holds no LoRA: expected adapter_model"):
        load_lora(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(InvalidLoraFileError, match="never opened"):
        load_lora(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(InvalidLoraFileError, match=r"no adapter_config\.json"):
        load_lora(tmp_path)


STEM = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ],
)
def test_load_lora_reads_every_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    down, up = torch.randn(4, 6).to(dtype), torch.randn(5, 4).to(dtype)
    for alpha in (
        torch.tensor(3.0).to(dtype),
        torch.tensor(3),
        torch.tensor(3, dtype=torch.int8),
        torch.tensor([3.0]),
    ):
        state = {f"{STEM}.lora_down.weight": down, f"{STEM}.lora_up.weight": up}
        save_file(state | {f"{STEM}.alpha": alpha}, tmp_path / "x.safetensors")
        file = load_lora(tmp_path / "x.safetensors")
        assert file.dtype == dtype
        (loaded_down,), (loaded_up,) = file.weights.down, file.weights.up
        assert torch.equal(loaded_down, down.float())
        assert torch.equal(loaded_up, (up.double() * 0.75).float())


def test_load_lora_reads_bystanders_of_any_kind(tmp_path: Path) -> None:
    state = {
        f"{STEM}.lora_down.weight": torch.randn(4, 6),
        f"{STEM}.lora_up.weight": torch.randn(5, 4),
        "bundle_emb.a b/c é.string_to_param.*": torch.full((2, 2), torch.nan),
        "global_step": torch.tensor(7),
        "clip_l": torch.ones(2, 2, dtype=torch.int32),
    }
    save_file(state, tmp_path / "x.safetensors")
    file = load_lora(tmp_path / "x.safetensors")
    assert len(file.weights.layout.targets) == 1
    assert "left out 3 keys" in file.notes[0] and "'global_step'" in file.notes[0]
    del state["global_step"], state["clip_l"], state[f"{STEM}.lora_up.weight"]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(InvalidLoraFileError, match=r"has down of lora_unet.* but no up"):
        load_lora(tmp_path / "x.safetensors")


def test_load_lora_limits_headers_of_uploads(tmp_path: Path) -> None:
    state = {
        f"{STEM}.lora_down.weight": torch.ones(4, 6),
        f"{STEM}.lora_up.weight": torch.ones(5, 4),
    }
    path = tmp_path / "x.safetensors"
    save_file(state, path, metadata={"ss_tag_frequency": "x" * (17 << 20)})
    for source in (path, path.read_bytes()):
        file = load_lora(source)
        assert len(file.metadata.extra["ss_tag_frequency"]) == 17 << 20
        with pytest.raises(InvalidLoraFileError, match=r"header claims 17826\d+ bytes"):
            load_lora(source, max_header_bytes=MAX_UPLOAD_HEADER_BYTES)
    written = load_lora(file.lora.save(tmp_path / "y.safetensors", format="kohya"))
    assert written.metadata.extra == file.metadata.extra
    assert load_file(path).keys() == state.keys()
