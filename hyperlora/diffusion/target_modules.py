"""Presets: the Linear and Conv2d layers of a denoiser or text encoder that take a LoRA."""

import re
from collections.abc import Collection, Mapping
from typing import Final

from torch import nn

from hyperlora.diffusion.families.registry import get_denoiser_family
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import LoraLayout, TargetModule, list_layers

TARGET_PRESETS: Final = ("attention", "attention+mlp", "attention+conv")
"""
``attention``: All projections of self- and cross-attention (UNet of SD 1.5: 128 target modules).
``attention+mlp``: Also feed-forward layers and the time embedding's projection in residual blocks,
    which small bases need.
``attention+conv``: Also convolutions (LoCon).
"""
_CLIP_ATTENTION = r"self_attn\.(q_proj|k_proj|v_proj|out_proj)$"
"""Text encoders always contribute q, k, v and out: kohya's format needs all four."""
_CLIP_FEED_FORWARD = r"\.mlp\.fc[12]$"


def make_layout(
    components: Mapping[str, nn.Module],
    preset: str,
    rank: int,
    base: str,
) -> LoraLayout:
    """Make the layout of a preset; ``DiffusionBase.make_layout`` does for a whole base.

    Args:
        components: Modules by component name: ``unet`` or ``transformer``, ``text_encoder``,
            ``text_encoder_2``.
        preset: One of ``TARGET_PRESETS``.
        rank: Of the LoRA, from 1 to the width of the widest target.
        base: Id of the base diffusion model.

    Returns:
        The layout over the target modules of all components, in their order.

    Raises:
        InvalidArgumentError: If the preset is unknown or not for this denoiser, if a part that it
            names matches nothing, or if the rank is below 1 or above what any target has.
        LayoutMismatchError: If a component has no target module.
    """
    if preset not in TARGET_PRESETS:
        raise InvalidArgumentError(f"unknown preset {preset!r}; known: {', '.join(TARGET_PRESETS)}")
    text_pattern = _CLIP_ATTENTION
    if preset == "attention+mlp":
        text_pattern = f"{_CLIP_ATTENTION}|{_CLIP_FEED_FORWARD}"
    targets: list[TargetModule] = []
    for name, module in components.items():
        is_denoiser = name in ("unet", "transformer")
        pattern = re.compile(
            get_denoiser_family(module).get_target_pattern(preset) if is_denoiser else text_pattern
        )
        paths = {path for path, _ in list_layers(module) if pattern.search(path)}
        if is_denoiser:
            _check_parts(module, preset, paths)
        targets += LoraLayout.from_module(module, name, paths.__contains__, rank, base).targets
    layout = LoraLayout(tuple(targets), rank, base)
    layout.check_rank(rank)
    return layout


def _check_parts(denoiser: nn.Module, preset: str, paths: Collection[str]) -> None:
    """Raise ``InvalidArgumentError`` if the denoiser has nothing of a part that a preset names."""
    family = get_denoiser_family(denoiser)
    patterns = {
        "attention": family.attention_pattern,
        "mlp": family.feed_forward_pattern,
        "conv": family.convolution_pattern or "",
    }
    for part in preset.split("+"):
        if not any(re.search(patterns[part], path) for path in paths):
            raise InvalidArgumentError(
                f"preset {preset!r} names {part}, and the {family.denoiser_name} of this "
                f"{family.modelspec_name} base has no such layer: use another preset"
            )
