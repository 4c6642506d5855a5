"""LoRAs asked for in a prompt, as A1111 and Forge write it.

<lora:NAME>  <lora:NAME:0.8>  <lora:NAME:TE:UNET>  <lora:NAME:te=0.5:unet=1:step=5-15>  also start=, stop=

The first number is the weight of both, the second that of the denoiser alone (``te`` the text encoders); ``start``,
``stop`` and ``step`` bound the denoising steps it acts in: below 1 a fraction of them, else a step number from 0.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Final

from torch import nn

from hyperlora.errors import BadRequest
from hyperlora.lora.blocks import weigh_blocks
from hyperlora.lora.io.find import find_lora
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.weights import LoraWeights

MAX_WEIGHT: Final = 10.0
_MENTION: Final = re.compile(r"<lora:([^<>]*)>")


@dataclass(frozen=True)
class Mention:
    """One ``<lora:...>``: ``text`` and ``denoiser`` weights; active from step ``start`` on, before ``stop``."""

    name: str
    text: float = 1.0
    denoiser: float = 1.0
    start: float = 0.0
    stop: float | None = None

    @property
    def always(self) -> bool:
        return self.start == 0 and self.stop is None

    def active(self, step: int, steps: int) -> bool:
        return _step(self.start, steps) <= step < (steps if self.stop is None else _step(self.stop, steps))


def mentions(prompt: str) -> tuple[str, tuple[Mention, ...]]:
    """The prompt without its ``<lora:...>``, and these in order.

    Raises ``BadRequest`` for one that cannot be understood or a weight outside [-10, 10].
    """
    found = tuple(_mention(text) for text in _MENTION.findall(prompt))
    clean = re.sub(r"\s+", " ", _MENTION.sub(" ", prompt)).replace(" ,", ",").strip(" ,")
    if "<lora" in clean:
        raise BadRequest("the prompt has a <lora:...> that is not closed: write <lora:name:weight>")
    return clean, found


def called_for(
    found: Sequence[Mention], folder: str | PathLike[str], modules: Mapping[str, nn.Module]
) -> list[LoraWeights]:
    """The LoRAs of mentions, from a folder, fitted to the live base and weighed. Raises what ``find_lora`` and
    ``load_lora`` raise."""
    return [_weighed(mention, load_lora(find_lora(folder, mention.name), modules=modules).weights) for mention in found]


def strengths(found: Sequence[Mention], step: int, steps: int, always: int = 0) -> list[float]:
    """1 for each of ``always`` other LoRAs and each mention that is active in this step, else 0: a ``composed``
    schedule."""
    return [1.0] * always + [float(mention.active(step, steps)) for mention in found]


def _weighed(mention: Mention, lora: LoraWeights) -> LoraWeights:
    text = {c for c in lora.layout.components if c.startswith("text_encoder")}
    return weigh_blocks(lora, {c: mention.text if c in text else mention.denoiser for c in lora.layout.components})


def _mention(inside: str) -> Mention:
    name, *parameters = (part.strip() for part in inside.split(":"))
    whole = f"<lora:{inside}>"
    if not name:
        raise BadRequest(f"{whole} names no LoRA: write <lora:name:weight>")
    positional = [p for p in parameters if "=" not in p]
    named = dict(p.split("=", 1) for p in parameters if "=" in p)
    if unknown := sorted(named.keys() - {"te", "unet", "start", "stop", "step"}):
        raise BadRequest(f"{whole} has the unknown parameter {unknown[0]!r}; known: te, unet, start, stop, step")
    if len(positional) > 2:
        raise BadRequest(f"{whole} has {len(positional)} weights: one for both, or text encoder and unet")
    text = _number(named.get("te", positional[0] if positional else "1"), whole, -MAX_WEIGHT, MAX_WEIGHT)
    denoiser = _number(named.get("unet", positional[-1] if positional else str(text)), whole, -MAX_WEIGHT, MAX_WEIGHT)
    first, _, last = named.get("step", "").partition("-")
    start = _number(named.get("start", first or "0"), whole, 0, 10_000)
    stop = named.get("stop", last)
    return Mention(name, text, denoiser, start, _number(stop, whole, 0, 10_000) if stop else None)


def _number(text: str, whole: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise BadRequest(f"{whole}: a number was expected, got {text!r}") from None
    if not least <= value <= most:
        raise BadRequest(f"{whole}: a number between {least:g} and {most:g} was expected, got {text}")
    return value


def _step(bound: float, steps: int) -> float:
    return bound * steps if bound < 1 else bound
