"""Format x base x tool: which tool loads which file completely.

diffusers is called itself. The key names of kohya and ComfyUI are written here as tables:
* kohya-ss/sd-scripts, ``networks/lora.py`` (``lora_unet``/``lora_te`` + module path with ``_``)
  over its own UNets: diffusers' names for SD 1.x, Stability's (``input_blocks``...) for SDXL;
* comfyanonymous/ComfyUI, ``comfy/lora.py`` (``model_lora_keys_unet``, ``model_lora_keys_clip``)
  and ``comfy/utils.py`` (``unet_to_diffusers``, ``mmdit_to_diffusers``, ``flux_to_diffusers``,
  ``z_image_to_diffusers``).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from hyperlora.diffusion.target_modules import make_layout
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.keys import convert_path_to_sgm
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.weights import LoraWeights

SMALL = {"sample_size": 8, "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4}
CROSS = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")


def sd15() -> dict[str, nn.Module]:
    """Stable Diffusion 1's blocks at 4 channels."""
    from diffusers import UNet2DConditionModel

    return {
        "unet": UNet2DConditionModel(block_out_channels=(4, 4, 4, 4), **SMALL),
        **make_text_encoder("text_encoder"),
    }


def sdxl() -> dict[str, nn.Module]:
    """SDXL's blocks at 4 channels."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(4, 4, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8,
        **SMALL,
    )
    return {
        "unet": unet,
        **make_text_encoder("text_encoder"),
        **make_text_encoder("text_encoder_2"),
    }


def make_text_encoder(name: str) -> dict[str, nn.Module]:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return {
        name: CLIPTextModel(
            CLIPTextConfig(
                vocab_size=9, bos_token_id=0, eos_token_id=1, max_position_embeddings=8, **sizes
            )
        )
    }


def sd3() -> dict[str, nn.Module]:
    from diffusers import SD3Transformer2DModel

    sizes = {
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 1,
        "joint_attention_dim": 8,
        "caption_projection_dim": 8,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
    }
    return {
        "transformer": SD3Transformer2DModel(sample_size=8, in_channels=4, out_channels=4, **sizes)
    }


def flux() -> dict[str, nn.Module]:
    from diffusers import FluxTransformer2DModel

    sizes = {
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 1,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
        "in_channels": 4,
        "axes_dims_rope": (4, 6, 6),
    }
    return {"transformer": FluxTransformer2DModel(**sizes)}


def qwen_image() -> dict[str, nn.Module]:
    from diffusers import QwenImageTransformer2DModel

    sizes = {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 1,
        "joint_attention_dim": 8,
    }
    return {
        "transformer": QwenImageTransformer2DModel(
            in_channels=4, out_channels=1, axes_dims_rope=(4, 6, 6), **sizes
        )
    }


def z_image() -> dict[str, nn.Module]:
    from diffusers import ZImageTransformer2DModel

    sizes = {
        "n_layers": 2,
        "n_refiner_layers": 1,
        "dim": 16,
        "n_heads": 1,
        "n_kv_heads": 1,
        "cap_feat_dim": 8,
    }
    return {"transformer": ZImageTransformer2DModel(in_channels=4, axes_dims=[4, 6, 6], **sizes)}


BASES = {f.__name__: f for f in (sd15, sdxl, sd3, flux, qwen_image, z_image)}


@dataclass(frozen=True)
class Case:
    base: str
    preset: str
    format: str
    kohya: bool
    comfyui: bool


CASES = [
    Case("sd15", "attention", "kohya", True, True),
    Case("sd15", "attention+mlp", "kohya", True, True),
    Case("sd15", "attention+conv", "kohya", True, True),
    Case("sd15", "attention", "diffusers", False, False),
    Case("sdxl", "attention", "kohya", False, True),
    Case("sdxl", "attention+mlp", "sgm", True, True),
    Case("sdxl", "attention+conv", "sgm", True, True),
    Case("sdxl", "attention", "diffusers", False, False),
    *(
        Case(base, preset, "diffusers", False, True)
        for base in ("sd3", "flux", "qwen_image", "z_image")
        for preset in ("attention", "attention+mlp")
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.base}-{c.preset}-{c.format}")
def test_save_lora_is_loaded_completely_by_the_tools_of_its_format(
    case: Case, tmp_path: Path
) -> None:
    modules = BASES[case.base]()
    lora = make_random_lora(modules, case.preset, seed=1)
    path = save_lora(
        lora, tmp_path / "x.safetensors", format=case.format, metadata=LoraMetadata(title="matrix")
    )
    file = load_lora(path, modules=modules)
    assert torch.equal(file.weights.flatten(), lora.flatten())
    assert file.metadata.title == "matrix"
    stems = {re.sub(r"\.(lora_(A|B|down|up)\.weight|alpha)$", "", key) for key in load_file(path)}
    assert len(stems) == len(lora.layout.targets)
    targets = {target.name for target in lora.layout.targets}
    assert load_in_diffusers(case.base, modules, path) == targets
    assert (stems <= list_kohya_keys(case.base, modules)) == case.kohya
    assert (stems <= list_comfyui_keys(case.base, modules)) == case.comfyui


def make_random_lora(modules: Mapping[str, nn.Module], preset: str, seed: int) -> LoraWeights:
    layout = make_layout(modules, preset, 2, "tiny/base")
    return LoraWeights.unflatten(
        layout, torch.randn(layout.numel, generator=torch.Generator().manual_seed(seed))
    )


def load_in_diffusers(base: str, modules: Mapping[str, nn.Module], path: Path) -> set[str]:
    """Names of modules with an adapter after diffusers has loaded the file."""
    from diffusers import loaders

    if base in ("sd15", "sdxl"):
        mixin: Any = (
            loaders.StableDiffusionXLLoraLoaderMixin
            if base == "sdxl"
            else loaders.StableDiffusionLoraLoaderMixin
        )
        config = modules["unet"].config
        state, alphas = mixin.lora_state_dict(path, unet_config=config)
        mixin.load_lora_into_unet(state, alphas, modules["unet"])
        for name in ("text_encoder", "text_encoder_2"):
            if name in modules:
                mixin.load_lora_into_text_encoder(state, alphas, modules[name], prefix=name)
    else:
        names = {"sd3": "SD3", "flux": "Flux", "qwen_image": "QwenImage", "z_image": "ZImage"}
        mixin = getattr(loaders, f"{names[base]}LoraLoaderMixin")
        state = mixin.lora_state_dict(path)
        alphas = {"network_alphas": None} if base == "flux" else {}
        mixin.load_lora_into_transformer(state, transformer=modules["transformer"], **alphas)
    return {
        f"{component}.{name}"
        for component, module in modules.items()
        for name, layer in module.named_modules()
        if hasattr(layer, "lora_A") and len(layer.lora_A)
    }


def list_layers(module: nn.Module) -> Iterator[str]:
    """Paths of all layers that a LoRA can adapt, with or without an adapter."""
    for name, layer in module.named_modules():
        if hasattr(layer, "base_layer") or (
            isinstance(layer, nn.Linear | nn.Conv2d) and "lora_" not in name
        ):
            yield name.removesuffix(".base_layer")


def list_kohya_keys(base: str, modules: Mapping[str, nn.Module]) -> set[str]:
    if base not in ("sd15", "sdxl"):
        return set()
    keys = set()
    for name in list_layers(modules["unet"]):
        path = look_up_sgm_path(name) if base == "sdxl" else name
        keys.add("lora_unet_" + path.replace(".", "_"))
    return keys | list_clip_keys(base, modules)


def list_clip_keys(base: str, modules: Mapping[str, nn.Module]) -> set[str]:
    prefixes = {
        "text_encoder": "lora_te1_" if base == "sdxl" else "lora_te_",
        "text_encoder_2": "lora_te2_",
    }
    return {
        prefixes[component] + f"text_model_encoder_layers_{layer}_{part}"
        for component in modules.keys() & prefixes.keys()
        for layer in range(2)
        for part in ("mlp_fc1", "mlp_fc2", *(f"self_attn_{p}_proj" for p in ("q", "k", "v", "out")))
    }


def list_comfyui_keys(base: str, modules: Mapping[str, nn.Module]) -> set[str]:
    if base in ("sd15", "sdxl"):
        keys = list_clip_keys(base, modules)
        for name in list_layers(modules["unet"]):
            if base == "sdxl":
                keys.add("lora_unet_" + look_up_sgm_path(name).replace(".", "_"))
            keys |= {
                "lora_unet_" + name.replace(".", "_"),
                "unet." + name.replace(".to_", ".processor.to_").removesuffix(".0"),
            }
        return keys
    return {
        f"transformer.{name}"
        for name in list_layers(modules["transformer"])
        if re.fullmatch(COMFYUI_DITS[base], name)
    }


_JOINT = (
    r"attn2?\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff(_context)?\.net\.(0\.proj|2)"
    r"|norm1(_context)?\.linear"
)
_SINGLE = r"norm\.linear|attn\.to_[qkv]|proj_mlp|proj_out"
_Z_BLOCK = r"attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0"
COMFYUI_DITS = {
    "sd3": rf"transformer_blocks\.\d+\.({_JOINT})",
    "flux": rf"transformer_blocks\.\d+\.({_JOINT})|single_transformer_blocks\.\d+\.({_SINGLE})",
    "qwen_image": r".*",  # its own module names are diffusers'
    "z_image": rf"(layers|noise_refiner|context_refiner)\.\d+\.({_Z_BLOCK})",
}


def look_up_sgm_path(path: str) -> str:
    """ComfyUI's ``unet_to_diffusers`` for SDXL, written out block by block."""
    resnet = {
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    ends = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    blocks = {
        **{f"down_blocks.0.resnets.{i}": f"input_blocks.{i + 1}.0" for i in (0, 1)},
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        **{
            f"down_blocks.1.{kind}.{i}": f"input_blocks.{i + 4}.{n}"
            for i in (0, 1)
            for n, kind in KINDS
        },
        "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
        **{
            f"down_blocks.2.{kind}.{i}": f"input_blocks.{i + 7}.{n}"
            for i in (0, 1)
            for n, kind in KINDS
        },
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        **{
            f"up_blocks.0.{kind}.{i}": f"output_blocks.{i}.{n}"
            for i in (0, 1, 2)
            for n, kind in KINDS
        },
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        **{
            f"up_blocks.1.{kind}.{i}": f"output_blocks.{i + 3}.{n}"
            for i in (0, 1, 2)
            for n, kind in KINDS
        },
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        **{f"up_blocks.2.resnets.{i}": f"output_blocks.{i + 6}.0" for i in (0, 1, 2)},
    }
    if path in ends:
        return ends[path]
    block = next(b for b in blocks if path == b or path.startswith(f"{b}."))
    suffix = path[len(block) + 1 :]
    return ".".join(p for p in (blocks[block], resnet.get(suffix, suffix)) if p)


KINDS = ((0, "resnets"), (1, "attentions"))


def test_convert_path_to_sgm_covers_every_sdxl_module() -> None:
    names = list(list_layers(sdxl()["unet"]))
    assert {name: convert_path_to_sgm(name) for name in names} == {
        name: look_up_sgm_path(name) for name in names
    }
    assert len({convert_path_to_sgm(name) for name in names}) == len(names)


@pytest.mark.parametrize("base", ["sd3", "sd15"])
def test_save_lora_refuses_sgm_for_other_bases(base: str, tmp_path: Path) -> None:
    lora = make_random_lora(BASES[base](), "attention+conv" if base == "sd15" else "attention", 0)
    with pytest.raises(InvalidArgumentError, match=r"SDXL has no module|use another format"):
        save_lora(lora, tmp_path / "x.safetensors", format="sgm")
    assert not list(tmp_path.iterdir())


@settings(max_examples=8)
@given(
    st.integers(0, 2**20),
    st.sampled_from([c for c in CASES if c.format != "diffusers"]),
    st.sampled_from([1, 3]),
)
def test_conversion_between_formats_keeps_numbers(
    tmp_path_factory: Any, seed: int, case: Case, rank: int
) -> None:
    folder = tmp_path_factory.mktemp("trip")
    modules = _MODULES_BY_BASE.setdefault(case.base, BASES[case.base]())
    layout = make_layout(modules, case.preset, rank, "tiny/base")
    lora = LoraWeights.unflatten(
        layout, torch.randn(layout.numel, generator=torch.Generator().manual_seed(seed))
    )
    current = lora
    for format in ("diffusers", case.format, "diffusers", "kohya"):
        path = save_lora(current, folder / f"{format}.safetensors", format=format)
        current = load_lora(path, modules=modules).weights
    assert torch.equal(current.flatten(), lora.flatten())


_MODULES_BY_BASE: dict[str, dict[str, nn.Module]] = {}
