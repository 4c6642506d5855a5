"""LoRAs asked for in a prompt, as A1111 and Forge write it.

<lora:NAME>  <lora:NAME:0.8>  <lora:NAME:TE:UNET>  <lora:NAME:te=0.5:unet=1:step=5-15>  also start=, stop=

The first number is the weight of both, the second that of the denoiser alone (``te`` the text encoders); ``start_build``,
``stop`` and ``step`` bound the denoising steps it acts in: below 1 a fraction of them, else a step number from 0.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Final

from torch import nn

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.blocks import scale_blocks
from hyperlora.lora.io.find import find_lora
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.weights import LoraWeights

MAX_WEIGHT: Final = 10.0
_LORA_TAG: Final = re.compile(r"<lora:([^<>]*)>")


@dataclass(frozen=True)
class LoraTag:
    """One ``<lora:...>``: ``text_encoder_weight`` and ``denoiser_weight`` weights; active from step ``start_build`` on, before ``stop``."""

    name: str
    text_encoder_weight: float = 1.0
    denoiser_weight: float = 1.0
    start: float = 0.0
    stop: float | None = None

    @property
    def is_constant(self) -> bool:
        return self.start == 0 and self.stop is None

    def is_active(self, step: int, num_steps: int) -> bool:
        return (
            _resolve_step(self.start, num_steps)
            <= step
            < (num_steps if self.stop is None else _resolve_step(self.stop, num_steps))
        )


def parse_lora_tags(prompt: str) -> tuple[str, tuple[LoraTag, ...]]:
    """The prompt without its ``<lora:...>``, and these in order.

    Raises ``InvalidArgumentError`` for one that cannot be understood or a weight outside [-10, 10].
    """
    tags = tuple(_parse_tag(text) for text in _LORA_TAG.findall(prompt))
    clean_prompt = re.sub(r"\s+", " ", _LORA_TAG.sub(" ", prompt)).replace(" ,", ",").strip(" ,")
    if "<lora" in clean_prompt:
        raise InvalidArgumentError(
            "the prompt has a <lora:...> that is not closed: write <lora:name:weight>"
        )
    return clean_prompt, tags


def load_tagged_loras(
    tags: Sequence[LoraTag], folder: str | PathLike[str], modules: Mapping[str, nn.Module]
) -> list[LoraWeights]:
    """The LoRAs of mentions, from a folder, fitted to the live base and weighed. Raises what ``find_lora`` and
    ``load_lora`` raise."""
    return [
        _scale_tagged_lora(
            mention, load_lora(find_lora(folder, mention.name), modules=modules).weights
        )
        for mention in tags
    ]


def compute_tag_scales(
    tags: Sequence[LoraTag], step: int, num_steps: int, num_constant: int = 0
) -> list[float]:
    """1 for each of ``always`` other LoRAs and each mention that is active in this step, else 0: a ``compose_loras``
    schedule."""
    return [1.0] * num_constant + [float(mention.is_active(step, num_steps)) for mention in tags]


def _scale_tagged_lora(tag: LoraTag, lora: LoraWeights) -> LoraWeights:
    text_encoders = {c for c in lora.layout.components if c.startswith("text_encoder")}
    return scale_blocks(
        lora,
        {
            c: tag.text_encoder_weight if c in text_encoders else tag.denoiser_weight
            for c in lora.layout.components
        },
    )


def _parse_tag(body: str) -> LoraTag:
    name, *parameters = (part.strip() for part in body.split(":"))
    tag_text = f"<lora:{body}>"
    if not name:
        raise InvalidArgumentError(f"{tag_text} names no LoRA: write <lora:name:weight>")
    positional = [p for p in parameters if "=" not in p]
    named = dict(p.split("=", 1) for p in parameters if "=" in p)
    if unknown_names := sorted(named.keys() - {"te", "unet", "start", "stop", "step"}):
        raise InvalidArgumentError(
            f"{tag_text} has the unknown parameter {unknown_names[0]!r}; known: te, unet, start, stop, step"
        )
    if len(positional) > 2:
        raise InvalidArgumentError(
            f"{tag_text} has {len(positional)} weights: one for both, or text encoder and unet"
        )
    text_encoder_weight = _parse_number(
        named.get("te", positional[0] if positional else "1"), tag_text, -MAX_WEIGHT, MAX_WEIGHT
    )
    denoiser_weight = _parse_number(
        named.get("unet", positional[-1] if positional else str(text_encoder_weight)),
        tag_text,
        -MAX_WEIGHT,
        MAX_WEIGHT,
    )
    first_step, _, last_step = named.get("step", "").partition("-")
    start = _parse_number(named.get("start", first_step or "0"), tag_text, 0, 10_000)
    stop = named.get("stop", last_step)
    return LoraTag(
        name,
        text_encoder_weight,
        denoiser_weight,
        start,
        _parse_number(stop, tag_text, 0, 10_000) if stop else None,
    )


def _parse_number(text: str, tag_text: str, minimum: float, maximum: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InvalidArgumentError(f"{tag_text}: a number was expected, got {text!r}") from None
    if not minimum <= value <= maximum:
        raise InvalidArgumentError(
            f"{tag_text}: a number between {minimum:g} and {maximum:g} was expected, got {text}"
        )
    return value


def _resolve_step(bound: float, num_steps: int) -> float:
    return bound * num_steps if bound < 1 else bound
