"""LoRA tags in a prompt, in the syntax of A1111 and Forge.

    <lora:NAME>  <lora:NAME:0.8>  <lora:NAME:TE:UNET>  <lora:NAME:te=0.5:unet=1:step=5-15>

The first number is the weight in text encoder and denoiser, the second that in the denoiser.
Parameters ``te`` and ``unet`` name the two. ``start``, ``stop`` and ``step`` limit the denoising
steps in which the LoRA is active: below 1 a fraction of the steps, else a step number from 0.

As in A1111, ``lyco`` is the same as ``lora``. Upper and lower case, blanks and full-width signs
change nothing in a tag, and a tag of any other kind is refused.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
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
MAX_STEP: Final = 10_000
_BLANKS: Final = " \t\r\n\u00a0\u200b\u3000\ufeff"
_LORA_KINDS: Final = ("lora", "lyco")
"""A1111 takes ``lyco`` for the same thing."""
_TAG: Final = re.compile(
    # each sign also full-width, as Chinese and Japanese keyboards write it, or as HTML escapes it;
    # a backslash before it comes from Markdown
    r"\\*(?:[<\uff1c]|&lt;)[\s\u200b]*(?P<kind>\w+)[\s\u200b]*[:\uff1a]"
    r"(?P<body>[^<>\uff1c\uff1e]*?)\\*(?:[>\uff1e]|&gt;)"
)
"""A1111's ``<kind:...>``, where blanks change nothing."""
_BROKEN_TAG: Final = re.compile(
    r"(?:<|&lt;)[\s\u200b]*(?:lora|lyco)\b|\b(?:lora|lyco)[\s\u200b]*:[^<>]*>", re.IGNORECASE
)
_PARAMETER_NAMES: Final = ("te", "unet", "start", "stop", "step")


@dataclass(frozen=True)
class LoraTag:
    """One ``<lora:...>`` of a prompt.

    Attributes:
        name: Name of the LoRA's file, without its suffix.
        text_encoder_weight: Factor of the LoRA in the text encoders.
        denoiser_weight: Factor of the LoRA in the denoiser.
        start: First active step, or fraction of the steps below 1.
        stop: First step after the active ones, or fraction of the steps; None: active to the end.
    """

    name: str
    text_encoder_weight: float = 1.0
    denoiser_weight: float = 1.0
    start: float = 0.0
    stop: float | None = None

    @property
    def is_constant(self) -> bool:
        """Whether the LoRA is active in every step."""
        return self.start == 0 and self.stop is None

    def is_active(self, step: int, num_steps: int) -> bool:
        """Return whether the LoRA is active in a step.

        Args:
            step: Number of the step, from 0.
            num_steps: Number of steps of the run.

        Returns:
            True from ``start`` on and before ``stop``.
        """
        start = _resolve_step(self.start, num_steps)
        stop = num_steps if self.stop is None else _resolve_step(self.stop, num_steps)
        return start <= step < stop


def parse_lora_tags(prompt: str) -> tuple[str, tuple[LoraTag, ...]]:
    """Split a prompt into plain text and LoRA tags.

    Args:
        prompt: A prompt with any number of tags.

    Returns:
        The prompt without tags, and the tags in order.

    Raises:
        InvalidArgumentError: A tag cannot be parsed, is none of a LoRA, or its weight is outside
            [-10, 10].
    """
    tags = tuple(_parse_tag(match) for match in _TAG.finditer(prompt))
    clean_prompt = re.sub(r"\s+", " ", _TAG.sub(" ", prompt)).replace(" ,", ",").strip(" ,")
    if _BROKEN_TAG.search(unicodedata.normalize("NFKC", clean_prompt)):
        raise InvalidArgumentError(
            "the prompt has a <lora:...> that is not opened or not closed: write <lora:name:weight>"
        )
    return clean_prompt, tags


def check_no_lora_tags(prompts: Iterable[str], noun: str = "prompt") -> None:
    """Check that no text has a tag, which its reader would take for words.

    Args:
        prompts: Texts that are encoded as they are.
        noun: What such a text is called in the error message.

    Raises:
        InvalidArgumentError: A text has a tag.
    """
    for prompt in prompts:
        _, tags = parse_lora_tags(prompt)
        if tags:
            raise InvalidArgumentError(
                f"the {noun} names the LoRA {tags[0].name!r} by a tag, which only the prompt of "
                f"an image may have: give the LoRA itself, or move the tag there"
            )


def load_tagged_loras(
    tags: Sequence[LoraTag], folder: str | PathLike[str], modules: Mapping[str, nn.Module]
) -> list[LoraWeights]:
    """Load the LoRAs of tags from a folder and scale them by their weights.

    Args:
        tags: The tags.
        folder: The folder that ``find_lora`` searches.
        modules: Components of the base by name, to which the LoRAs must fit.

    Returns:
        One LoRA for each tag.

    Raises:
        InvalidArgumentError: No file or several files have the name, see ``find_lora``.
        InvalidLoraFileError: A file cannot be loaded, see ``load_lora``.
        LayoutMismatchError: A LoRA does not fit the base.
    """
    return [
        _scale_tagged_lora(tag, load_lora(find_lora(folder, tag.name), modules=modules).weights)
        for tag in tags
    ]


def compute_tag_scales(
    tags: Sequence[LoraTag], step: int, num_steps: int, num_constant: int = 0
) -> list[float]:
    """Compute the scale of each LoRA in one step, as a ``compose_loras`` schedule returns it.

    Args:
        tags: The tags.
        step: Number of the step, from 0.
        num_steps: Number of steps of the run.
        num_constant: LoRAs without a tag that stand before those of the tags.

    Returns:
        1 for each LoRA without a tag; then 1 for each active tag and 0 for each inactive one.
    """
    return [1.0] * num_constant + [float(tag.is_active(step, num_steps)) for tag in tags]


def _scale_tagged_lora(tag: LoraTag, lora: LoraWeights) -> LoraWeights:
    """Scale the text encoders and the denoiser of a LoRA by the weights of its tag."""
    component_weights = {
        component: tag.text_encoder_weight
        if component.startswith("text_encoder")
        else tag.denoiser_weight
        for component in lora.layout.components
    }
    return scale_blocks(lora, component_weights)


def _parse_tag(match: re.Match[str]) -> LoraTag:
    """Parse a tag, with its kind and what follows the first colon as groups."""
    kind, body = unicodedata.normalize("NFKC", match["kind"]), match["body"].strip(_BLANKS)
    tag_text = f"<{kind}:{body}>"
    if kind.lower() not in _LORA_KINDS:
        raise InvalidArgumentError(
            f"{tag_text} is no LoRA, and {kind!r} is not supported in prompts: leave it out, or "
            "write <lora:name:weight>"
        )
    name, parameters = _split_body(body)
    if not name:
        raise InvalidArgumentError(f"{tag_text} names no LoRA: write <lora:name:weight>")
    positional = [p for p in parameters if "=" not in p]
    named = _parse_named_parameters(parameters, tag_text)
    if len(positional) > 2:
        raise InvalidArgumentError(
            f"{tag_text} has {len(positional)} weights: one for both, or text encoder and unet"
        )
    text_encoder_text = named.get("te", positional[0] if positional else "1")
    text_encoder_weight = _parse_number(text_encoder_text, tag_text, -MAX_WEIGHT, MAX_WEIGHT)
    denoiser_text = named.get("unet", positional[-1] if positional else str(text_encoder_weight))
    denoiser_weight = _parse_number(denoiser_text, tag_text, -MAX_WEIGHT, MAX_WEIGHT)
    first_step, _, last_step = named.get("step", "").partition("-")
    start = _parse_number(named.get("start", first_step or "0"), tag_text, 0, MAX_STEP)
    stop_text = named.get("stop", last_step)
    stop = _parse_number(stop_text, tag_text, 0, MAX_STEP) if stop_text else None
    # a fraction and a step number cannot be compared before the number of steps is known
    if stop is not None and stop <= start and (stop < 1) == (start < 1):
        raise InvalidArgumentError(f"{tag_text} stops at {stop:g}, but only starts at {start:g}")
    return LoraTag(name, text_encoder_weight, denoiser_weight, start, stop)


def _split_body(body: str) -> tuple[str, list[str]]:
    """Split what follows ``<lora:`` into name and parameters.

    A name may hold colons itself, if a weight follows: in ``a:b:0.8`` it is ``a:b``.
    """
    parts = [part.strip(_BLANKS) for part in re.split("[:\uff1a]", body)]
    num_name_parts = 1
    if _is_parameter(parts[-1]):
        num_name_parts = max(
            [i + 1 for i, part in enumerate(parts) if not _is_parameter(part)] or [1]
        )
    name = ":".join(parts[:num_name_parts])
    return name, [unicodedata.normalize("NFKC", part) for part in parts[num_name_parts:]]


def _is_parameter(part: str) -> bool:
    """Whether a part of a tag is a number or ``key=value``."""
    try:
        float(part)
    except ValueError:
        return "=" in part
    return True


def _parse_named_parameters(parameters: Sequence[str], tag_text: str) -> dict[str, str]:
    """Parse the parameters of the form ``key=value``."""
    pairs = [parameter.split("=", 1) for parameter in parameters if "=" in parameter]
    named = {key.strip().lower(): value.strip() for key, value in pairs}
    if unknown_names := sorted(named.keys() - set(_PARAMETER_NAMES)):
        raise InvalidArgumentError(
            f"{tag_text} has the unknown parameter {unknown_names[0]!r}; "
            f"known: {', '.join(_PARAMETER_NAMES)}"
        )
    if len(named) < len(pairs):
        raise InvalidArgumentError(f"{tag_text} gives a parameter twice: give each one once")
    return named


def _parse_number(text: str, tag_text: str, minimum: float, maximum: float) -> float:
    """Parse a number of a tag, or raise ``InvalidArgumentError`` with the text of the tag."""
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
    """Return a bound as a step number: below 1 it is a fraction of the steps."""
    return bound * num_steps if bound < 1 else bound
