"""What several LoRA files have in common: architecture, precision and metadata of their sum."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce
from itertools import combinations
from typing import Final

import torch

from hyperlora.lora.io.architectures import check_same_architecture
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.read import LoraContent

_DTYPES: Final = {
    torch.float64: torch.float32,
    torch.float8_e4m3fn: torch.float16,
    torch.float8_e5m2: torch.float16,
}
"""Precisions that files are read in but not written in -> the nearest one that is written."""


def check_files_compatible(names: Sequence[str], files: Sequence[LoraContent]) -> None:
    """Check that LoRA files are for one architecture, also where they share no target.

    Args:
        names: The names of the files.
        files: Their contents.

    Raises:
        LayoutMismatchError: Two files are for different architectures.
    """
    named_files = list(zip(names, files, strict=True))
    for (name, file), (other_name, other_file) in combinations(named_files, 2):
        check_same_architecture(
            name,
            file.metadata.architecture,
            file.weights.layout,
            (other_name, other_file.metadata.architecture, other_file.weights.layout),
        )


def choose_dtype(files: Iterable[LoraContent]) -> torch.dtype:
    """Choose the precision of a file that is made from others: theirs, of several the widest.

    Args:
        files: The contents of the files, at least one.

    Returns:
        float32, float16 or bfloat16; float32 for float16 and bfloat16 together.
    """
    return reduce(torch.promote_types, (_DTYPES.get(file.dtype, file.dtype) for file in files))


def merge_metadata(files: Sequence[LoraContent], title: str) -> LoraMetadata:
    """Merge metadata: what the files share, and every trigger phrase, license and photo.

    What a trainer wrote of one of them (captions, steps, its checkpoint) is left out.

    Args:
        files: The contents of the files, at least one.
        title: The title of the sum.

    Returns:
        The metadata of a file made from all of them.
    """
    all_metadata = [file.metadata for file in files]
    resolutions = {metadata.resolution for metadata in all_metadata}
    merged_from = ", ".join(metadata.title for metadata in all_metadata if metadata.title)
    return LoraMetadata(
        title=title,
        base_model=next((metadata.base_model for metadata in all_metadata), ""),
        architecture=next((m.architecture for m in all_metadata if m.architecture), ""),
        resolution=resolutions.pop() if len(resolutions) == 1 else None,
        trigger_phrase=_join_unique(metadata.trigger_phrase for metadata in all_metadata),
        license=_join_unique(metadata.license for metadata in all_metadata),
        encoder=_join_unique(metadata.encoder for metadata in all_metadata),
        encoder_license=_join_unique(metadata.encoder_license for metadata in all_metadata),
        reference_sha256=tuple(
            dict.fromkeys(
                sha256 for metadata in all_metadata for sha256 in metadata.reference_sha256
            )
        ),
        extra={"modelspec.merged_from": merged_from} if merged_from else {},
    )


def renew_metadata(metadata: LoraMetadata, title_suffix: str) -> LoraMetadata:
    """Renew what a change of the numbers makes untrue: the title and the date.

    Args:
        metadata: Of the file before.
        title_suffix: What was done, e.g. ``rank 4``.

    Returns:
        The metadata of the changed file.
    """
    title = f"{metadata.title} ({title_suffix})" if metadata.title else ""
    return replace(metadata, title=title, date="")


def _join_unique(texts: Iterable[str]) -> str:
    """Join texts that are not empty, each once, in their order."""
    return ", ".join(dict.fromkeys(filter(None, texts)))
