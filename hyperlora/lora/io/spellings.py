"""How programs spell the keys of one and the same LoRA: one table of prefixes and of suffixes.

prefix                            path                                suffix
transformer.base_model.model.     transformer_blocks.0.attn.to_q      .lora_A.default.weight
lora_unet_                        transformer_blocks_0_attn_to_q      .lora_down.weight
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from hyperlora.lora.io.keys import COMPONENTS, convert_key_to_peft

DENOISERS: Final = ("unet", "transformer")
_PREFIXES: Final[Mapping[str, tuple[str, ...]]] = {
    # ComfyUI, ai-toolkit, diffusion-pipe
    "model.diffusion_model.": DENOISERS,
    "diffusion_model.": DENOISERS,
    "text_encoders.clip_l.transformer.": ("text_encoder",),
    "text_encoders.clip_g.transformer.": ("text_encoder_2",),
    "text_encoders.t5xxl.transformer.": ("text_encoder_2", "text_encoder_3"),
    # diffusers
    "unet.": DENOISERS,
    "transformer.": ("transformer",),
    "transformer_2.": ("transformer_2",),
    "text_encoder.": ("text_encoder",),
    "text_encoder_2.": ("text_encoder_2",),
    "text_encoder_3.": ("text_encoder_3",),
    # kohya, OneTrainer, LyCORIS
    "lora_unet_": DENOISERS,
    "lora_transformer_": ("transformer",),
    "lycoris_": DENOISERS,
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3",),
}
"""Components that a prefix stands for. After one that ends in ``_``, paths have ``_`` for dots."""
_WRAPPERS: Final = ("base_model.model.", "_orig_mod.", "module.")
"""Modules around the base, of PEFT, torch.compile and DistributedDataParallel."""

_ROLE_PATTERN: Final = re.compile(
    r"(?P<stem>.+)\.(?:"
    r"(?P<plain>lora_(?:A|B|down|up|mid))(?:\.(?P<adapter>[\w-]+))?\.weight"
    r"|(?P<lycoris>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))"
    r"|(?P<alpha>alpha))"
)
_ROLES: Final[Mapping[str, str]] = {
    "lora_A": "down",
    "lora_down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "lora_mid": "mid",
}
_XLABS_PATTERN: Final = re.compile(
    r"(?P<stem>(?:\w+\.)*(?:double|single)_blocks\.\d+\.processor\.\w+_lora\d?)\.(?P<role>down|up)\.weight"
)
"""XLabs' keys of FLUX, which diffusers knows by their numbers: 1 for the image, 2 for the text."""
_OLD_PATTERN: Final = re.compile(r".+(?:_lora|\.lora|\.lora_linear_layer)\.(?:down|up)\.weight")
"""Keys of diffusers before PEFT."""

_REFUSED_KINDS: Final[Mapping[str, re.Pattern[str]]] = {
    "is DoRA": re.compile(r"dora_scale|lora_magnitude_vector"),
    "changes biases": re.compile(r"\.diff_b$|\.b_norm$"),
    "changes whole weights, e.g. of norms": re.compile(r"\.diff$|\.set_weight$|\.w_norm$"),
    "has LoRAs with biases": re.compile(r"\.bias$"),
    "has LoRAs of embeddings": re.compile(r"lora_embedding_[AB]"),
    "is OFT": re.compile(r"\.oft_|\.boft_"),
    "is IA3": re.compile(r"\.ia3_l|\.on_input$"),
    "is GLoRA": re.compile(r"\.(?:a1|a2|b1|b2|bm1|bm2)\.weight$"),
    "is VeRA": re.compile(r"vera_lambda_"),
}
"""What a key tells of a file that is no sum of plain LoRAs."""
_EMBEDDING_PATTERN: Final = re.compile(r"embed|position_ids|logit_scale", re.IGNORECASE)


@dataclass(frozen=True)
class AdapterKey:
    """A key of one tensor of a LoRA.

    Attributes:
        stem: The key without its suffix.
        role: ``down``, ``up``, ``mid``, ``alpha``, or LyCORIS' name, e.g. ``hada_w1_a``.
        adapter: The adapter's name in PEFT's keys, else empty.
    """

    stem: str
    role: str
    adapter: str = ""


def parse_key(key: str) -> AdapterKey | None:
    """Split a key of any program into stem and role; None if it belongs to no LoRA."""
    if match := _XLABS_PATTERN.fullmatch(key):
        return AdapterKey(match["stem"], match["role"])
    if _OLD_PATTERN.fullmatch(key) or ".processor." in key:
        key = convert_key_to_peft(key)
    match = _ROLE_PATTERN.fullmatch(key)
    if match is None:
        return None
    if plain := match["plain"]:
        return AdapterKey(match["stem"], _ROLES[plain], match["adapter"] or "")
    return AdapterKey(match["stem"], match["lycoris"] or "alpha")


@dataclass(frozen=True)
class StemParts:
    """A stem without prefix and wrappers.

    Attributes:
        components: Components that its prefix stands for, none if it has no prefix.
        path: Path of the module, whose dots may be ``_``.
        is_exact: Whether the prefix is diffusers' name of the component.
    """

    components: tuple[str, ...]
    path: str
    is_exact: bool


def split_stem(stem: str) -> StemParts:
    """Split a stem into the components that its prefix stands for and the path of a module."""
    components: tuple[str, ...] = ()
    is_exact = False
    while True:
        if wrapper := next(filter(stem.startswith, _WRAPPERS), None):
            stem = stem.removeprefix(wrapper)
        elif not components and (prefix := next(filter(stem.startswith, _PREFIXES), None)):
            components, stem = _PREFIXES[prefix], stem.removeprefix(prefix)
            is_exact = prefix.removesuffix(".") in COMPONENTS
        else:
            return StemParts(components, stem, is_exact)


def find_refused_kind(key: str) -> str | None:
    """Find what a file is by a key without a role in a LoRA, if leaving it out changes images.

    Args:
        key: A key for which ``parse_key`` returns None.

    Returns:
        The kind, a verb first; None for bystanders such as embeddings and steps of training.
    """
    if kind := next((kind for kind, p in _REFUSED_KINDS.items() if p.search(key)), None):
        return kind
    parts = split_stem(key)
    if not parts.components or _EMBEDDING_PATTERN.search(parts.path):
        return None
    return "has a tensor which belongs to no LoRA"
