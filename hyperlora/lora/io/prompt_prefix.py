"""Words with which every prompt must begin, or a LoRA does nothing; its file holds them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.safetensors_file import read_metadata

PROMPT_PREFIX_KEY: Final = "hyperlora.prompt_prefix"
"""The key of the file's metadata, e.g. with ``fcsks fxhks fhyks, `` for HyperLoRA."""


def read_lora_metadata(path: Path) -> LoraMetadata:
    """Read what a LoRA file says about itself, without its weights.

    Raises:
        InvalidLoraFileError: The header is malformed.
    """
    return LoraMetadata.from_safetensors_metadata(read_metadata(path))


def add_prompt_prefixes(prompt: str, metadata: Sequence[LoraMetadata]) -> str:
    """Put the prefixes of LoRA files before a prompt, unless it begins with them.

    Args:
        prompt: The prompt, without LoRA tags.
        metadata: The metadata of the files that are applied.

    Returns:
        The prompt with each prefix once, in the order of the files.
    """
    prefixes = dict.fromkeys(item.extra.get(PROMPT_PREFIX_KEY, "") for item in metadata)
    missing = [p for p in prefixes if p and not _begins_with(prompt, p)]
    return "".join(missing) + prompt


def _begins_with(prompt: str, prefix: str) -> bool:
    """Whether the words of the prefix stand first; commas and spaces do not count."""
    words, prefix_words = (text.replace(",", " ").split() for text in (prompt, prefix))
    return words[: len(prefix_words)] == prefix_words
