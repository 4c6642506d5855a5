"""``load_lora`` inverts ``save_lora``; alpha is folded in, ranks are padded."""

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
from hyperlora.lora.io.keys import LoraFormat
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.lora import Lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights

Make = Callable[..., LoraWeights]


def assert_equal(weights: LoraWeights, expected: LoraWeights) -> None:
    assert weights.layout == expected.layout
    assert torch.equal(weights.flatten(), expected.flatten())


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("preset", ["attention", "attention+mlp", "attention+conv"])
def test_load_lora_inverts_save_lora(
    modules: dict[str, nn.Module], random_lora: Make, tmp_path: Path, format: Any, preset: str
) -> None:
    lora = random_lora(modules, preset)
    path = save_lora(lora, tmp_path / "new folder" / "x.safetensors", format=format)
    assert_equal(load_lora(path, lora.layout).weights, lora)
    file = load_lora(path, modules=modules, base_id="tiny/base")
    assert_equal(file.weights, lora)
    assert file.format == format
    assert file.ranks == (3,) * len(lora.layout.targets)
    assert file.size_bytes == path.stat().st_size
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_lora_save_writes_what_serialize_returns(
    modules: dict[str, nn.Module], random_lora: Make, tmp_path: Path
) -> None:
    lora = Lora(random_lora(modules, "attention"), LoraMetadata(title="Ada", output_name="x"))
    path = (-2 * lora).save(tmp_path / "x.safetensors", format="kohya", dtype=torch.float16)
    assert path.read_bytes() == (-2 * lora).serialize(format="kohya", dtype=torch.float16)
    file = load_lora(path, lora.weights.layout)
    assert (file.format, file.lora.metadata.title) == ("kohya", "Ada")
    assert_equal(file.lora.weights, (lora.weights * -2).apply(lambda t: t.half().float()))


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_load_lora_without_base_takes_targets_from_the_file(
    modules: dict[str, nn.Module], random_lora: Make, tmp_path: Path, format: Any
) -> None:
    lora = random_lora({"unet": modules["unet"]})
    loaded = load_lora(save_lora(lora, tmp_path / "x.safetensors", format=format)).weights
    assert loaded.layout.base == "tiny/base"
    assert set(loaded.layout.targets) == set(lora.layout.targets)
    index = {target: i for i, target in enumerate(loaded.layout.targets)}
    for target, down, up in zip(lora.layout.targets, lora.down, lora.up, strict=True):
        assert torch.equal(loaded.down[index[target]], down)
        assert torch.equal(loaded.up[index[target]], up)
    layout = load_lora(
        save_lora(random_lora(modules), tmp_path / "y.safetensors", format=format)
    ).weights.layout
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj" in {
        target.name for target in layout.targets
    }


def test_load_lora_inverts_save_lora_for_transformers(
    transformer: nn.Module, random_lora: Make, tmp_path: Path
) -> None:
    lora = random_lora({"transformer": transformer}, "attention+mlp")
    path = save_lora(lora, tmp_path / "x.safetensors")
    assert_equal(load_lora(path, lora.layout).weights, lora)
    loaded = load_lora(path, modules={"transformer": transformer}, base_id="tiny/base")
    assert_equal(loaded.weights, lora)
    assert set(load_lora(path).weights.layout.targets) == set(lora.layout.targets)


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 6), st.booleans()), min_size=1, max_size=4
    ),
    rank=st.integers(1, 5),
    format=st.sampled_from(["diffusers", "kohya"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_load_lora_keeps_any_layout(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[tuple[int, int, bool]],
    rank: int,
    format: Any,
    dtype: torch.dtype,
) -> None:
    targets = tuple(
        TargetModule(
            f"unet.down_blocks.{i}.{'resnets.0.conv1' if conv else 'resnets.0.time_emb_proj'}",
            *shape,
            (3, 2) if conv else None,
        )
        for i, (in_channels, out_features, conv) in enumerate(sizes)
        for shape in [(in_channels * (6 if conv else 1), out_features)]
    )
    layout = LoraLayout(targets, rank, "any")
    lora = LoraWeights.unflatten(layout, torch.randn(layout.numel))
    path = save_lora(
        lora, tmp_path_factory.mktemp("any") / "x.safetensors", format=format, dtype=dtype
    )
    assert all(t.dtype == dtype for key, t in load_file(path).items() if not key.endswith(".alpha"))
    expected = lora.apply(lambda t: t.to(dtype).float())
    assert_equal(load_lora(path, layout).weights, expected)
    assert load_lora(path).weights.layout == layout


def test_load_lora_folds_kohya_alpha_and_pads_ranks(tmp_path: Path) -> None:
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
            (target.name for target in file.weights.layout.targets),
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


def test_load_lora_reads_stability_block_names(tmp_path: Path) -> None:
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    save_file(
        {f"{stem}.lora_down.weight": torch.ones(1, 2), f"{stem}.lora_up.weight": torch.ones(3, 1)},
        tmp_path / "k.safetensors",
    )
    (target,) = load_lora(tmp_path / "k.safetensors").weights.layout.targets
    assert target == TargetModule(
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", 2, 3
    )


def test_load_lora_reads_old_diffusers_keys(tmp_path: Path) -> None:
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    text = "text_encoder.text_model.encoder.layers.0.self_attn"
    old = {
        f"{path}.processor.to_out_lora.down.weight": torch.ones(1, 2),
        f"{path}.processor.to_out_lora.up.weight": torch.ones(3, 1),
        f"{text}.q_proj.lora_linear_layer.down.weight": torch.ones(1, 2),
        f"{text}.q_proj.lora_linear_layer.up.weight": torch.ones(3, 1),
    }
    save_file(old, tmp_path / "old.safetensors")
    layout = load_lora(tmp_path / "old.safetensors").weights.layout
    names = {target.name for target in layout.targets}
    assert names == {f"{path}.to_out.0", f"{text}.q_proj"}


@pytest.mark.parametrize(("rslora", "scale"), [(False, 0.5), (True, 1.0)])
def test_load_lora_folds_alpha_of_adapter_metadata(
    modules: dict[str, nn.Module], random_lora: Make, tmp_path: Path, rslora: bool, scale: float
) -> None:
    lora = random_lora({"unet": modules["unet"]}, "attention", rank=4)
    path = save_lora(lora, tmp_path / "x.safetensors", format="diffusers")
    special = lora.layout.targets[3]
    config = {
        "unet.r": 4,
        "unet.lora_alpha": 2,
        "unet.use_rslora": rslora,
        "unet.alpha_pattern": {special.path: 12},
        "unet.target_modules": [target.path for target in lora.layout.targets],
    }
    save_file(load_file(path), path, metadata={"lora_adapter_metadata": json.dumps(config)})
    for target, loaded_delta, delta in zip(
        lora.layout.targets,
        load_lora(path, lora.layout).weights.get_delta_weights(),
        lora.get_delta_weights(),
        strict=True,
    ):
        torch.testing.assert_close(
            loaded_delta, delta * (scale * 6 if target == special else scale)
        )


def test_load_lora_by_modules_reads_part_of_a_base(
    modules: dict[str, nn.Module], random_lora: Make, tmp_path: Path
) -> None:
    part = random_lora({"text_encoder": modules["text_encoder"]})
    formats: tuple[LoraFormat, ...] = ("diffusers", "kohya")
    for format in formats:
        path = save_lora(part, tmp_path / f"{format}.safetensors", format=format)
        assert_equal(load_lora(path, modules=modules, base_id="tiny/base").weights, part)


def test_save_lora_numbers_text_encoders_of_sdxl_only(
    modules: dict[str, nn.Module], random_lora: Make, tmp_path: Path
) -> None:
    lora = random_lora(modules, "attention")
    tensors = load_file(save_lora(lora, tmp_path / "1.safetensors", format="kohya"))
    assert {key.split("_text")[0] for key in tensors if "_text" in key} == {"lora_te"}
    alphas = [tensor for key, tensor in tensors.items() if key.endswith(".alpha")]
    assert all(alpha.item() == 3 and alpha.ndim == 0 for alpha in alphas)
    sdxl = LoraMetadata(architecture="stable-diffusion-xl-v1-base")
    path = save_lora(lora, tmp_path / "xl.safetensors", format="kohya", metadata=sdxl)
    assert {key.split("_text")[0] for key in load_file(path) if "_text" in key} == {"lora_te1"}
    assert_equal(load_lora(path, lora.layout).weights, lora)


def test_inspect_lora_summarizes_a_file(
    modules: dict[str, nn.Module], random_lora: Make, tmp_path: Path
) -> None:
    lora = random_lora(modules, "attention")
    path = save_lora(
        lora, tmp_path / "x.safetensors", metadata=LoraMetadata(title="Ada"), dtype=torch.float16
    )
    info = inspect_lora(path, lora.layout)
    total = (
        sum(float(torch.linalg.matrix_norm(delta)) ** 2 for delta in lora.get_delta_weights())
        ** 0.5
    )
    assert info.norm == pytest.approx(total, rel=1e-3)
    assert sum(norm**2 for norm in info.component_norms.values()) == pytest.approx(
        total**2, rel=1e-3
    )
    assert (info.components, info.num_targets) == (
        ("unet", "text_encoder"),
        len(lora.layout.targets),
    )
    assert (info.base, info.fingerprint) == ("tiny/base", lora.layout.fingerprint)
    assert (info.rank_counts, info.size_bytes) == (
        {3: len(lora.layout.targets)},
        path.stat().st_size,
    )
    assert json.loads(json.dumps(info.to_dict()))["metadata"]["title"] == "Ada"
    with safe_open(path, "pt") as file:
        assert file.metadata()["hyperlora.layout_fingerprint"] == info.fingerprint
