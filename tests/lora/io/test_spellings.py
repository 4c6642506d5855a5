"""Every spelling of one and the same LoRA gives the same ΔW, which diffusers reads, too."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hyperlora.errors import InvalidLoraFileError, LayoutMismatchError
from hyperlora.lora.io import converters
from hyperlora.lora.io.converters import CONVERTERS
from hyperlora.lora.io.load import LoraFile, load_lora
from hyperlora.lora.io.module_names import DENOISER_SIZES
from hyperlora.lora.layout import LoraLayout, list_layers
from tests.tiny_pipelines import get_tiny_pipeline, mark_heavy

Pairs = Mapping[str, tuple[Tensor, Tensor]]
ALPHA, RANK = 2.0, 3
SCALE = ALPHA / RANK


def make_pairs(module: nn.Module, paths: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Random factors down [r, in] and up [out, r] for some layers."""
    generator = torch.Generator().manual_seed(len(paths))
    pairs = {}
    for path in paths:
        out_features, *in_sizes = module.get_submodule(path).weight.shape
        down = torch.randn(RANK, *in_sizes, generator=generator)
        up = torch.randn(out_features, RANK, *[1] * (len(in_sizes) - 1), generator=generator)
        pairs[path] = (down, up)
    return pairs


def list_deltas(file: LoraFile) -> dict[str, Tensor]:
    """ΔW [out, in] by target."""
    layout = file.weights.layout
    names = [target.name for target in layout.targets]
    return dict(zip(names, file.weights.get_delta_weights(), strict=True))


def assert_deltas(file: LoraFile, expected: Mapping[str, Tensor]) -> None:
    deltas = list_deltas(file)
    assert deltas.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(deltas[name], delta, rtol=1e-5, atol=1e-5)


def compute_deltas(pairs: Pairs, component: str, scale: float = 1.0) -> dict[str, Tensor]:
    return {
        f"{component}.{path}": scale * (up.flatten(1) @ down.flatten(1))
        for path, (down, up) in pairs.items()
    }


def write_peft(pairs: Pairs, path: Path, prefix: str, adapter: str = "") -> Path:
    """PEFT's suffixes, with or without the name of the adapter."""
    state = {}
    for name, (down, up) in pairs.items():
        state[f"{prefix}{name}.lora_A{adapter}.weight"] = down
        state[f"{prefix}{name}.lora_B{adapter}.weight"] = up
    save_file(state, path)
    return path


def write_kohya(pairs: Pairs, path: Path, prefix: str, keep_dots: bool = False) -> Path:
    """kohya's suffixes, and alpha."""
    state = {}
    for name, (down, up) in pairs.items():
        stem = prefix + (name if keep_dots else name.replace(".", "_"))
        state[f"{stem}.lora_down.weight"] = down
        state[f"{stem}.lora_up.weight"] = up
        state[f"{stem}.alpha"] = torch.tensor(ALPHA)
    save_file(state, path)
    return path


PEFT_PREFIXES = (
    "{component}.",
    "",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.",
    "{component}.base_model.model.",
    "base_model.model.{component}.",
    "_orig_mod.",
)
KOHYA_PREFIXES = ("lora_unet_", "lycoris_", "lora_{kind}_")
LAYERS = {
    "stable_diffusion": (
        "unet",
        [
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
            "up_blocks.1.resnets.0.conv1",
            "time_embedding.linear_1",
        ],
    ),
    "stable_diffusion_3": (
        "transformer",
        ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.0.proj"],
    ),
    "flux": (
        "transformer",
        [
            "transformer_blocks.0.attn.to_out.0",
            "transformer_blocks.0.ff_context.net.2",
            "single_transformer_blocks.0.proj_mlp",
            "single_transformer_blocks.0.attn.to_v",
        ],
    ),
    "flux2_klein": (
        "transformer",
        ["transformer_blocks.0.attn.add_k_proj", "single_transformer_blocks.0.attn.to_out"],
    ),
    "qwen_image": (
        "transformer",
        ["transformer_blocks.0.attn.to_add_out", "transformer_blocks.0.img_mlp.net.2"],
    ),
    "z_image": (
        "transformer",
        ["layers.0.attention.to_out.0", "context_refiner.0.feed_forward.w2"],
    ),
    "lumina_2": ("transformer", ["layers.0.attn.to_k", "noise_refiner.0.norm1.linear"]),
    "chroma": ("transformer", ["single_transformer_blocks.0.attn.to_q"]),
    "hidream": ("transformer", ["double_stream_blocks.0.block.attn1.to_q_t"]),
    "krea_2": ("transformer", ["transformer_blocks.0.attn.to_gate"]),
}
FAST = ("stable_diffusion", "flux", "z_image", "flux2_klein")


@pytest.mark.parametrize("family", mark_heavy(LAYERS, FAST))
def test_load_lora_reads_every_prefix(family: str, tmp_path: Path) -> None:
    tiny = get_tiny_pipeline(family)
    component, paths = LAYERS[family]
    modules = {component: tiny.denoiser}
    pairs = make_pairs(tiny.denoiser, paths)
    plain, scaled = (compute_deltas(pairs, component, scale) for scale in (1.0, SCALE))
    layout = None
    for i, prefix in enumerate(PEFT_PREFIXES):
        for adapter in ("", ".default", ".my-adapter"):
            path = tmp_path / f"{i}{adapter}.safetensors"
            write_peft(pairs, path, prefix.format(component=component), adapter)
            file = load_lora(path, modules=modules)
            assert_deltas(file, plain)
            layout = file.weights.layout
            assert_deltas(load_lora(path, layout), plain)
    for prefix in KOHYA_PREFIXES:
        kind = "unet" if component == "unet" else "transformer"
        path = write_kohya(pairs, tmp_path / "k.safetensors", prefix.format(kind=kind))
        assert_deltas(load_lora(path, modules=modules), scaled)
        assert_deltas(load_lora(path, layout), scaled)
    path = write_kohya(pairs, tmp_path / "c.safetensors", "diffusion_model.", keep_dots=True)
    assert_deltas(load_lora(path, modules=modules), scaled)


@pytest.mark.parametrize("family", [name for name in LAYERS if name != "stable_diffusion"])
def test_load_lora_reads_every_prefix_without_base(family: str, tmp_path: Path) -> None:
    component, paths = LAYERS[family]
    pairs = {
        path: (torch.randn(RANK, 8), torch.randn(8, RANK)) for path in paths
    }  # square, as no converter is needed
    plain, scaled = (compute_deltas(pairs, component, scale) for scale in (1.0, SCALE))
    for prefix in PEFT_PREFIXES:
        path = tmp_path / "p.safetensors"
        write_peft(pairs, path, prefix.format(component=component))
        assert_deltas(load_lora(path), plain)
    for prefix in KOHYA_PREFIXES:
        path = write_kohya(pairs, tmp_path / "k.safetensors", prefix.format(kind="transformer"))
        assert_deltas(load_lora(path), scaled)


FUSED = {
    "flux": {
        "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{p}" for p in "qkv"],
        "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{p}_proj" for p in "qkv"],
        "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
        "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.net.2"],
        "double_blocks.0.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
        "single_blocks.0.linear1": [
            *(f"single_transformer_blocks.0.attn.to_{p}" for p in "qkv"),
            "single_transformer_blocks.0.proj_mlp",
        ],
        "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    },
    "flux2_klein": {
        "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{p}" for p in "qkv"],
        "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.linear_in"],
        "single_blocks.0.linear1": ["single_transformer_blocks.0.attn.to_qkv_mlp_proj"],
        "single_blocks.0.linear2": ["single_transformer_blocks.0.attn.to_out"],
    },
    "z_image": {
        "layers.0.attention.qkv": [f"layers.0.attention.to_{p}" for p in "qkv"],
        "layers.0.attention.out": ["layers.0.attention.to_out.0"],
    },
    "lumina_2": {
        "layers.0.attention.qkv": [f"layers.0.attn.to_{p}" for p in "qkv"],
        "layers.0.feed_forward.w1": ["layers.0.feed_forward.linear_1"],
    },
    "stable_diffusion_3": {
        "joint_blocks.0.x_block.attn.qkv": [f"transformer_blocks.0.attn.to_{p}" for p in "qkv"],
    },
    "krea_2": {"blocks.0.attn.wq": ["transformer_blocks.0.attn.to_q"]},
}
NOT_IN_DIFFUSERS = ("lumina_2", "stable_diffusion_3")
"""Whose converters take whole blocks of the released sizes only, or no such names."""


def make_fused_pairs(family: str) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Factors by the original model's names, and what they mean in diffusers."""
    denoiser = get_tiny_pipeline(family).denoiser
    generator = torch.Generator().manual_seed(4)
    pairs, deltas = {}, {}
    for name, paths in FUSED[family].items():
        weights = [denoiser.get_submodule(path).weight for path in paths]
        widths = [len(weight) for weight in weights]
        down = torch.randn(RANK, weights[0].shape[1], generator=generator)
        up = torch.randn(sum(widths), RANK, generator=generator)
        pairs[name] = (down, up)
        for path, rows in zip(paths, up.split(widths), strict=True):
            deltas[f"transformer.{path}"] = rows @ down
    return pairs, deltas


@pytest.mark.parametrize("family", mark_heavy(FUSED, ("flux", "flux2_klein", "z_image")))
def test_load_lora_splits_fused_layers(family: str, tmp_path: Path) -> None:
    pairs, deltas = make_fused_pairs(family)
    modules = {"transformer": get_tiny_pipeline(family).denoiser}
    scaled_deltas = {name: SCALE * delta for name, delta in deltas.items()}
    for prefix in ("diffusion_model.", "base_model.model.", "", "transformer."):
        path = write_peft(pairs, tmp_path / "p.safetensors", prefix)
        file = load_lora(path, modules=modules)
        assert_deltas(file, deltas)
        assert_deltas(load_lora(path, file.weights.layout), deltas)
    path = write_kohya(pairs, tmp_path / "k.safetensors", "lora_unet_")
    assert_deltas(load_lora(path, modules=modules), scaled_deltas)


@pytest.mark.parametrize("family", mark_heavy(FUSED, ("flux", "flux2_klein", "z_image")))
def test_load_lora_reads_what_diffusers_reads(family: str, tmp_path: Path) -> None:
    if family in NOT_IN_DIFFUSERS:
        pytest.skip("diffusers reads no such file")
    tiny = get_tiny_pipeline(family)
    pairs, _ = make_fused_pairs(family)
    pairs.pop("single_blocks.0.linear1" if family == "flux" else "", None)  # real sizes only there
    num_targets = sum(len(FUSED[family][name]) for name in pairs)
    write: dict[str, Callable[[Path], Path]] = {
        "kohya": lambda path: write_kohya(pairs, path, "lora_unet_"),
        "comfyui": lambda path: write_peft(pairs, path, "diffusion_model."),
        "comfyui with alpha": lambda path: write_kohya(pairs, path, "diffusion_model.", True),
    }
    num_compared = 0
    for name, write_fn in write.items():
        path = write_fn(tmp_path / f"{name}.safetensors")
        try:
            deltas = read_with_diffusers(tiny.pipe, path)
        except (ValueError, KeyError, AssertionError):
            continue
        if len(deltas) < num_targets:
            continue  # dropped in silence
        num_compared += 1
        assert_deltas(load_lora(path, modules={"transformer": tiny.denoiser}), deltas)
    assert num_compared


def read_with_diffusers(pipe: Any, path: Path) -> dict[str, Tensor]:
    """ΔW by target, after plain diffusers has loaded a file."""
    pipe.load_lora_weights(str(path), adapter_name="test")
    try:
        return {
            f"transformer.{name}": layer.get_delta_weight("test").clone()
            for name, layer in pipe.transformer.named_modules()
            if hasattr(layer, "lora_A") and "test" in layer.lora_A
        }
    finally:
        pipe.unload_lora_weights()


def test_load_lora_splits_fused_layers_without_base(tmp_path: Path) -> None:
    """FLUX.1's and FLUX.2's blocks have one name, and other shapes."""
    width = 16
    shapes = {
        "FLUX.1": {"img_mlp.0": (4, 1), "linear1": (7, 1), "linear2": (1, 5)},
        "FLUX.2": {"img_mlp.0": (6, 1), "linear1": (9, 1), "linear2": (1, 4)},
    }
    expected = {
        "FLUX.1": {"ff.net.0.proj", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v"},
        "FLUX.2": {"ff.linear_in", "attn.to_qkv_mlp_proj", "attn.to_out"},
    }
    for family, layers in shapes.items():
        pairs = {
            f"{'double' if 'mlp' in name else 'single'}_blocks.7.{name}": (
                torch.randn(RANK, width * columns),
                torch.randn(width * rows, RANK),
            )
            for name, (rows, columns) in layers.items()
        }
        path = write_kohya(pairs, tmp_path / "k.safetensors", "lora_unet_")
        targets = load_lora(path).weights.layout.targets
        assert {target.path.split(".7.")[1] for target in targets} == expected[family]
    attention = {"double_blocks.0.img_attn.qkv": (torch.randn(2, 8), torch.randn(24, 2))}
    path = write_kohya(attention, tmp_path / "a.safetensors", "lora_unet_")
    assert len(load_lora(path).weights.layout.targets) == 3  # named alike in both
    odd = {"double_blocks.0.img_mlp.0": (torch.randn(2, 8), torch.randn(40, 2))}
    path = write_kohya(odd, tmp_path / "o.safetensors", "lora_unet_")
    with pytest.raises(InvalidLoraFileError, match=r"o\.safetensors has a LoRA under lora_unet_d"):
        load_lora(path)


def test_load_lora_reads_several_spellings_in_one_file(tmp_path: Path) -> None:
    tiny = get_tiny_pipeline("stable_diffusion")
    component, paths = LAYERS["stable_diffusion"]
    pairs = make_pairs(tiny.denoiser, paths)
    state = {}
    prefixes = ("lora_unet_", "unet.", "diffusion_model.", "base_model.model.")
    for (path, (down, up)), prefix in zip(pairs.items(), prefixes, strict=True):
        stem = prefix + (path.replace(".", "_") if prefix.endswith("_") else path)
        sides = ("lora_down", "lora_up") if prefix.startswith("lora") else ("lora_A", "lora_B")
        state |= {f"{stem}.{sides[0]}.weight": down, f"{stem}.{sides[1]}.weight": up}
    save_file(state, tmp_path / "mixed.safetensors")
    for modules in (None, {"unet": tiny.denoiser}):
        file = load_lora(tmp_path / "mixed.safetensors", modules=modules)
        assert_deltas(file, compute_deltas(pairs, component))


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_load_lora_reads_attention_processors(prefix: str, tmp_path: Path) -> None:
    tiny = get_tiny_pipeline("stable_diffusion")
    block = "mid_block.attentions.0.transformer_blocks.0.attn2"
    paths = [f"{block}.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")]
    pairs = make_pairs(tiny.denoiser, paths)
    state = {}
    for path, (down, up) in pairs.items():
        part = path.removeprefix(f"{block}.").removesuffix(".0")
        state[f"{prefix}{block}.processor.{part}_lora.down.weight"] = down
        state[f"{prefix}{block}.processor.{part}_lora.up.weight"] = up
    save_file(state, tmp_path / "old.safetensors")
    for modules in (None, {"unet": tiny.denoiser}):
        file = load_lora(tmp_path / "old.safetensors", modules=modules)
        assert_deltas(file, compute_deltas(pairs, "unet"))


def test_load_lora_reads_stability_names_of_both_unets(tmp_path: Path) -> None:
    from hyperlora.lora.io.keys import convert_path_to_sgm

    for family in ("stable_diffusion", "stable_diffusion_xl"):
        denoiser = get_tiny_pipeline(family).denoiser
        path = "down_blocks.0.resnets.0.conv1"
        pairs = make_pairs(denoiser, [path])
        stem = convert_path_to_sgm(path)
        expected = compute_deltas(pairs, "unet")
        for prefix in ("diffusion_model.", "lora_unet_", "model.diffusion_model."):
            name = stem.replace(".", "_") if prefix.endswith("_") else stem
            write_peft({name: pairs[path]}, tmp_path / "s.safetensors", prefix)
            for modules in (None, {"unet": denoiser}):
                assert_deltas(load_lora(tmp_path / "s.safetensors", modules=modules), expected)


def test_load_lora_reads_every_layer_of_sdxl_without_base(tmp_path: Path) -> None:
    """Also those that diffusers' own converter loses."""
    denoiser = get_tiny_pipeline("stable_diffusion_xl").denoiser
    pattern = re.compile(r"\.to_|proj|conv|embedding|\.ff\.")
    paths = [path for path, _ in list_layers(denoiser) if pattern.search(path)]
    pairs = make_pairs(denoiser, paths)
    path = write_kohya(pairs, tmp_path / "k.safetensors", "lora_unet_")
    assert_deltas(load_lora(path), compute_deltas(pairs, "unet", SCALE))


def test_load_lora_reads_text_encoders_of_comfyui_and_kohya(tmp_path: Path) -> None:
    clip = "text_model.encoder.layers.0.self_attn.q_proj"
    t5 = "encoder.block.0.layer.0.SelfAttention.q"
    stems = {
        f"text_encoders.clip_l.transformer.{clip}": f"text_encoder.{clip}",
        f"text_encoders.clip_g.transformer.{clip}": f"text_encoder_2.{clip}",
        "lora_te_text_model_encoder_layers_1_mlp_fc1": (
            "text_encoder.text_model.encoder.layers.1.mlp.fc1"
        ),
        "lora_te3_" + t5.replace(".", "_"): f"text_encoder_3.{t5}",
        "lycoris_text_model_encoder_layers_2_mlp_fc2": (
            "text_encoder.text_model.encoder.layers.2.mlp.fc2"
        ),
    }
    state = {f"{stem}.lora_down.weight": torch.randn(2, 3) for stem in stems}
    state |= {f"{stem}.lora_up.weight": torch.randn(4, 2) for stem in stems}
    save_file(state, tmp_path / "t.safetensors")
    targets = load_lora(tmp_path / "t.safetensors").weights.layout.targets
    assert {target.name for target in targets} == set(stems.values())


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_load_lora_reads_xlabs_keys(prefix: str, tmp_path: Path) -> None:
    down, up = torch.randn(2, 8), torch.randn(24, 2)
    stem = f"{prefix}double_blocks.3.processor.qkv_lora2"
    save_file({f"{stem}.down.weight": down, f"{stem}.up.weight": up}, tmp_path / "x.safetensors")
    expected = {
        f"transformer.transformer_blocks.3.attn.add_{p}_proj": rows @ down
        for p, rows in zip("qkv", up.chunk(3), strict=True)
    }
    assert_deltas(load_lora(tmp_path / "x.safetensors"), expected)


def test_load_lora_says_which_component_is_missing(tmp_path: Path) -> None:
    tiny = get_tiny_pipeline("stable_diffusion")
    pairs = {"encoder.layers.0.mlp.fc1": (torch.ones(1, 2), torch.ones(3, 1))}
    path = write_kohya(pairs, tmp_path / "t.safetensors", "lora_te_text_model_")
    with pytest.raises(LayoutMismatchError, match="give text_encoder of the base, too"):
        load_lora(path, modules={"unet": tiny.denoiser})


def test_load_lora_refuses_partial_matches(tmp_path: Path) -> None:
    tiny = get_tiny_pipeline("flux")
    pairs = make_pairs(tiny.denoiser, LAYERS["flux"][1])
    pairs["transformer_blocks.99.attn.to_q"] = (torch.ones(RANK, 4), torch.ones(4, RANK))
    path = write_peft(pairs, tmp_path / "x.safetensors", "diffusion_model.")
    with pytest.raises(LayoutMismatchError, match=r"has 1 targets .*transformer_blocks\.99"):
        load_lora(path, modules={"transformer": tiny.denoiser})
    layout = load_lora(path).weights.layout
    smaller = LoraLayout(layout.targets[:2], layout.rank, layout.base)
    with pytest.raises(LayoutMismatchError, match=r"has 2 of the 2 targets .* and 3 others"):
        load_lora(path, smaller)


def test_every_family_has_its_converter() -> None:
    import diffusers

    from hyperlora.diffusion.families.registry import FAMILIES

    for pipeline_name, family in FAMILIES.items():
        if family.denoiser_name == "transformer":
            converter = CONVERTERS[family.denoiser_class_name]
            mixin = getattr(diffusers.loaders.lora_pipeline, converter.mixin_name)
            assert issubclass(getattr(diffusers, pipeline_name), mixin)
            assert converter.family in converters.COMFYUI_LAYERS
    assert DENOISER_SIZES.keys() == CONVERTERS.keys()
