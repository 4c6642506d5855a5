"""Presets: the Linear and Conv2d layers of a denoiser or text encoder that take a LoRA."""

import re
from collections.abc import Mapping
from typing import Final

from torch import nn

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import LoraLayout

_ATTENTION = r"(^|\.)(attn\d?|attention)\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$"
_FEED_FORWARD = (
    r"(^|\.)(ff(_context)?|img_mlp|txt_mlp)\.net\.(0\.proj|2)$|\.feed_forward\.w[123]$"
    r"|^single_transformer_blocks\.\d+\.proj_(mlp|out)$"
)
_TIME = r"\.time_emb_proj$"
_CONV = r"\.(conv1|conv2|conv_shortcut|conv|proj_in|proj_out)$"
_TEXT = r"self_attn\.(q_proj|k_proj|v_proj|out_proj)$"
TARGET_PRESETS: Final[Mapping[str, str]] = {
    "attention": f"{_ATTENTION}|{_TEXT}",
    "attention+mlp": f"{_ATTENTION}|{_FEED_FORWARD}|{_TIME}|{_TEXT}|\\.mlp\\.fc[12]$",
    "attention+conv": f"{_ATTENTION}|{_CONV}|{_TEXT}",
}
"""Regular expressions of module paths.

``attention``: All projections of self- and cross-attention (UNet of SD 1.5: 128 target modules).
``attention+mlp``: Also feed-forward layers and the time embedding's projection in residual blocks,
    which small bases need.
``attention+conv``: Also convolutions (LoCon).

Text encoders always contribute q, k, v and out: kohya's format needs all four.
"""


def make_layout(
    components: Mapping[str, nn.Module], preset: str, rank: int, base: str
) -> LoraLayout:
    """Make the layout of a preset.

    Args:
        components: Modules by component name: ``unet`` or ``transformer``, ``text_encoder``,
            ``text_encoder_2``.
        preset: One of ``TARGET_PRESETS``.
        rank: Of the LoRA, at least 1.
        base: Id of the base diffusion model.

    Returns:
        The layout over the target modules of all components, in their order.

    Raises:
        InvalidArgumentError: If the preset is unknown or the rank is below 1.
        LayoutMismatchError: If a component has no target module.
    """
    if preset not in TARGET_PRESETS:
        raise InvalidArgumentError(f"unknown preset {preset!r}; known: {', '.join(TARGET_PRESETS)}")
    if rank < 1:
        raise InvalidArgumentError(f"rank must be at least 1, got {rank}")
    pattern = re.compile(TARGET_PRESETS[preset])
    layouts = [
        LoraLayout.from_module(module, name, lambda path: bool(pattern.search(path)), rank, base)
        for name, module in components.items()
    ]
    return LoraLayout(tuple(target for layout in layouts for target in layout.targets), rank, base)
