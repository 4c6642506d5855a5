"""What is saved is what is loaded, number by number; alpha of other tools is folded; ranks are evened out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hyperlora.lora.io.inspect import inspect_lora
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights

Make = Callable[..., LoraWeights]


def assert_same(one: LoraWeights, other: LoraWeights) -> None:
    assert one.layout == other.layout
    assert torch.equal(one.flatten(), other.flatten())


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("preset", ["attention", "attention+mlp", "attention+conv"])
def test_load_undoes_save(
    modules: dict[str, nn.Module], random_lora: Make, tmp_path: Path, format: Any, preset: str
) -> None:
    lora = random_lora(modules, preset)
    path = save_lora(lora, tmp_path / "new folder" / "x.safetensors", format=format)
    assert_same(load_lora(path, lora.layout).weights, lora)
    file = load_lora(path, modules=modules)
    assert_same(file.weights, lora)
    assert file.format == format
    assert file.ranks == (3,) * len(lora.layout.targets)
    assert file.size_bytes == path.stat().st_size
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_without_a_base_the_sites_come_from_the_file(
    modules: dict[str, nn.Module], random_lora: Make, tmp_path: Path, format: Any
) -> None:
    lora = random_lora({"unet": modules["unet"]})
    found = load_lora(save_lora(lora, tmp_path / "x.safetensors", format=format)).weights
    assert found.layout.base == "tiny/base"
    assert set(found.layout.targets) == set(lora.layout.targets)
    index = {site: i for i, site in enumerate(found.layout.targets)}
    for site, down, up in zip(lora.layout.targets, lora.down, lora.up, strict=True):
        assert torch.equal(found.down[index[site]], down)
        assert torch.equal(found.up[index[site]], up)
    whole = load_lora(
        save_lora(random_lora(modules), tmp_path / "y.safetensors", format=format)
    ).weights.layout
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj" in {
        site.name for site in whole.targets
    }


def test_dit_round_trip(transformer: nn.Module, random_lora: Make, tmp_path: Path) -> None:
    lora = random_lora({"transformer": transformer}, "attention+mlp")
    path = save_lora(lora, tmp_path / "x.safetensors")
    assert_same(load_lora(path, lora.layout).weights, lora)
    assert_same(load_lora(path, modules={"transformer": transformer}).weights, lora)
    assert set(load_lora(path).weights.layout.targets) == set(lora.layout.targets)


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 6), st.booleans()), min_size=1, max_size=4
    ),
    rank=st.integers(1, 5),
    format=st.sampled_from(["diffusers", "kohya"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_any_layout_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[tuple[int, int, bool]],
    rank: int,
    format: Any,
    dtype: torch.dtype,
) -> None:
    sites = tuple(
        TargetModule(
            f"unet.down_blocks.{i}.{'resnets.0.conv1' if conv else 'attentions.0.proj_in'}",
            *shape,
            kernel,
        )
        for i, (fan_in, fan_out, conv) in enumerate(sizes)
        for kernel in [(3, 2) if conv else None]
        for shape in [(fan_in * (6 if conv else 1), fan_out)]
    )
    layout = LoraLayout(sites, rank, "any")
    lora = LoraWeights.unflatten(layout, torch.randn(layout.numel))
    path = save_lora(
        lora, tmp_path_factory.mktemp("any") / "x.safetensors", format=format, dtype=dtype
    )
    assert all(t.dtype == dtype for key, t in load_file(path).items() if not key.endswith(".alpha"))
    expected = lora.apply(lambda t: t.to(dtype).float())
    assert_same(load_lora(path, layout).weights, expected)
    assert load_lora(path).weights.layout == layout


def test_kohya_alpha_is_folded_and_ranks_are_padded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    q, conv = "lora_unet_down_blocks_0_attentions_0_proj_in", "lora_unet_mid_block_resnets_0_conv1"
    tensors = {
        f"{q}.lora_down.weight": torch.randn(4, 6),
        f"{q}.lora_up.weight": torch.randn(5, 4),
        f"{q}.alpha": torch.tensor(1.0, dtype=torch.bfloat16),
        f"{conv}.lora_down.weight": torch.randn(2, 3, 3, 3),
        f"{conv}.lora_up.weight": torch.randn(7, 2, 1, 1),
        f"{conv}.alpha": torch.tensor(8),
    }
    save_file(tensors, tmp_path / "k.safetensors")
    file = load_lora(tmp_path / "k.safetensors")
    deltas = dict(
        zip(
            (site.name for site in file.weights.layout.targets),
            file.weights.get_delta_weights(),
            strict=True,
        )
    )
    expected = tensors[f"{q}.lora_up.weight"] @ tensors[f"{q}.lora_down.weight"] * (1 / 4)
    torch.testing.assert_close(deltas["unet.down_blocks.0.attentions.0.proj_in"], expected)
    expected = (
        tensors[f"{conv}.lora_up.weight"].flatten(1)
        @ tensors[f"{conv}.lora_down.weight"].flatten(1)
        * (8 / 2)
    )
    torch.testing.assert_close(deltas["unet.mid_block.resnets.0.conv1"], expected)
    assert file.weights.layout.rank == 4
    assert sorted(file.ranks) == [2, 4]
    assert inspect_lora(tmp_path / "k.safetensors").rank_counts == {2: 1, 4: 1}


def test_stability_block_numbers_of_sdxl_files_are_understood(tmp_path: Path) -> None:
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    save_file(
        {f"{stem}.lora_down.weight": torch.ones(1, 2), f"{stem}.lora_up.weight": torch.ones(3, 1)},
        tmp_path / "k.safetensors",
    )
    (site,) = load_lora(tmp_path / "k.safetensors").weights.layout.targets
    assert site == TargetModule(
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", 2, 3
    )


def test_old_diffusers_spelling_is_understood(tmp_path: Path) -> None:
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    text = "text_encoder.text_model.encoder.layers.0.self_attn"
    old = {
        f"{path}.processor.to_out_lora.down.weight": torch.ones(1, 2),
        f"{path}.processor.to_out_lora.up.weight": torch.ones(3, 1),
        f"{text}.q_proj.lora_linear_layer.down.weight": torch.ones(1, 2),
        f"{text}.q_proj.lora_linear_layer.up.weight": torch.ones(3, 1),
    }
    save_file(old, tmp_path / "old.safetensors")
    names = {site.name for site in load_lora(tmp_path / "old.safetensors").weights.layout.targets}
    assert names == {f"{path}.to_out.0", f"{text}.q_proj"}


@pytest.mark.parametrize(("rslora", "scale"), [(False, 0.5), (True, 1.0)])
def test_alpha_of_the_diffusers_header_is_folded(
    modules: dict[str, nn.Module], random_lora: Make, tmp_path: Path, rslora: bool, scale: float
) -> None:
    lora = random_lora({"unet": modules["unet"]}, "attention", rank=4)
    path = save_lora(lora, tmp_path / "x.safetensors")
    special = lora.layout.targets[3]
    config = {
        "unet.r": 4,
        "unet.lora_alpha": 2,
        "unet.use_rslora": rslora,
        "unet.alpha_pattern": {special.path: 12},
        "unet.target_modules": [site.path for site in lora.layout.targets],
    }
    save_file(load_file(path), path, metadata={"lora_adapter_metadata": json.dumps(config)})
    for site, mine, delta in zip(
        lora.layout.targets,
        load_lora(path, lora.layout).weights.get_delta_weights(),
        lora.get_delta_weights(),
        strict=True,
    ):
        torch.testing.assert_close(mine, delta * (scale * 6 if site == special else scale))


def test_a_file_of_part_of_the_base_loads_by_modules(
    modules: dict[str, nn.Module], random_lora: Make, tmp_path: Path
) -> None:
    part = random_lora({"text_encoder": modules["text_encoder"]})
    for format in ("diffusers", "kohya"):
        path = save_lora(part, tmp_path / f"{format}.safetensors", format=format)  # type: ignore[arg-type]
        assert_same(load_lora(path, modules=modules).weights, part)


def test_kohya_prefix_of_the_text_encoder_follows_the_base(
    modules: dict[str, nn.Module], random_lora: Make, tmp_path: Path
) -> None:
    lora = random_lora(modules, "attention")
    one = load_file(save_lora(lora, tmp_path / "1.safetensors", format="kohya"))
    assert {key.split("_text")[0] for key in one if "_text" in key} == {"lora_te"}
    assert all(one[key].item() == 3 and one[key].ndim == 0 for key in one if key.endswith(".alpha"))
    sdxl = LoraMetadata(architecture="stable-diffusion-xl-v1-base")
    path = save_lora(lora, tmp_path / "xl.safetensors", format="kohya", metadata=sdxl)
    assert {key.split("_text")[0] for key in load_file(path) if "_text" in key} == {"lora_te1"}
    assert_same(load_lora(path, lora.layout).weights, lora)


def test_describe_sums_up(modules: dict[str, nn.Module], random_lora: Make, tmp_path: Path) -> None:
    lora = random_lora(modules, "attention")
    path = save_lora(
        lora, tmp_path / "x.safetensors", metadata=LoraMetadata(title="Ada"), dtype=torch.float16
    )
    summary = inspect_lora(path, lora.layout)
    total = (
        sum(float(torch.linalg.matrix_norm(delta)) ** 2 for delta in lora.get_delta_weights())
        ** 0.5
    )
    assert summary.norm == pytest.approx(total, rel=1e-3)
    assert sum(norm**2 for norm in summary.component_norms.values()) == pytest.approx(
        total**2, rel=1e-3
    )
    assert (summary.components, summary.num_targets) == (
        ("unet", "text_encoder"),
        len(lora.layout.targets),
    )
    assert (summary.base, summary.fingerprint) == ("tiny/base", lora.layout.fingerprint)
    assert (summary.rank_counts, summary.size_bytes) == (
        {3: len(lora.layout.targets)},
        path.stat().st_size,
    )
    assert json.loads(json.dumps(summary.to_dict()))["header"]["title"] == "Ada"
    with safe_open(path, "pt") as file:
        assert file.metadata()["hyperlora.layout_fingerprint"] == summary.fingerprint
