"""What several LoRA files have in common: architecture, precision and metadata of their sum."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce
from itertools import combinations
from typing import Final

import torch

from hyperlora.lora.io.architectures import check_same_architecture
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.negative_lora import NEGATIVE_LORA_KEY
from hyperlora.lora.io.prompt_prefix import PROMPT_PREFIX_KEY
from hyperlora.lora.io.read import LoraContent

_DTYPES: Final = {
    torch.float64: torch.float32,
    torch.float8_e4m3fn: torch.float16,
    torch.float8_e5m2: torch.float16,
}
"""Precisions that files are read in but not written in -> the nearest one that is written."""
_MIN_TOTAL_WEIGHT: Final = 1e-6
_COMMERCIAL_USE_KEY: Final = "hyperlora.commercial_use"
_JOINED_KEYS: Final = {
    "hyperlora.face_pack": ", ",
    "hyperlora.face_pack_license": ", ",
    PROMPT_PREFIX_KEY: "",
}
"""Further keys whose different values all hold for the sum -> what stands between them."""
_SHARED_KEYS: Final = (
    NEGATIVE_LORA_KEY,
    "hyperlora.consent",
    "hyperlora.num_inference_steps",
    "hyperlora.guidance_scale",
    "hyperlora.shift",
)
"""Further keys that hold for the sum if all files have one value."""


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


def merge_metadata(
    files: Sequence[LoraContent], title: str, weights: Sequence[float]
) -> LoraMetadata:
    """Merge metadata: what the files share, and every trigger phrase, license and photo.

    A trigger phrase whose files have weights of sum 0 is left out: the difference of two LoRAs of
    one phrase is a slider, and calls up nobody. Words with which prompts must begin stay. What a
    trainer wrote of one of the files (captions, steps, its checkpoint) is left out.

    Args:
        files: The contents of the files, at least one.
        title: The title of the sum.
        weights: The factor of each file in the sum.

    Returns:
        The metadata of a file made from all of them.
    """
    all_metadata = [file.metadata for file in files]
    resolutions = {metadata.resolution for metadata in all_metadata}
    strengths = {metadata.recommended_strength for metadata in all_metadata}
    merged_from = ", ".join(metadata.title for metadata in all_metadata if metadata.title)
    return LoraMetadata(
        title=title,
        base_model=next((metadata.base_model for metadata in all_metadata), ""),
        architecture=next((m.architecture for m in all_metadata if m.architecture), ""),
        resolution=resolutions.pop() if len(resolutions) == 1 else None,
        trigger_phrase=_merge_triggers(all_metadata, weights),
        license=_join_unique(metadata.license for metadata in all_metadata),
        encoder=_join_unique(metadata.encoder for metadata in all_metadata),
        encoder_license=_join_unique(metadata.encoder_license for metadata in all_metadata),
        reference_sha256=tuple(
            dict.fromkeys(
                sha256 for metadata in all_metadata for sha256 in metadata.reference_sha256
            )
        ),
        recommended_strength=strengths.pop() if len(strengths) == 1 else 1.0,
        extra=_merge_extra(all_metadata)
        | ({"modelspec.merged_from": merged_from} if merged_from else {}),
    )


def _merge_triggers(all_metadata: Sequence[LoraMetadata], weights: Sequence[float]) -> str:
    """Join the trigger phrases of the files that the sum holds more of than it subtracts."""
    totals = dict[str, float]()
    for metadata, weight in zip(all_metadata, weights, strict=True):
        totals[metadata.trigger_phrase] = totals.get(metadata.trigger_phrase, 0.0) + weight
    return _join_unique(phrase for phrase, total in totals.items() if total > _MIN_TOTAL_WEIGHT)


def _merge_extra(all_metadata: Sequence[LoraMetadata]) -> dict[str, str]:
    """Merge the keys of networks that others released; a file without a key says nothing of it."""
    extra = dict[str, str]()
    for key, separator in _JOINED_KEYS.items():
        if text := _join_unique((m.extra.get(key, "") for m in all_metadata), separator):
            extra[key] = text
    for key in _SHARED_KEYS:
        values = {metadata.extra.get(key, "") for metadata in all_metadata}
        if len(values) == 1 and (value := values.pop()):
            extra[key] = value
    if uses := {metadata.extra.get(_COMMERCIAL_USE_KEY, "") for metadata in all_metadata} - {""}:
        is_known = all(_COMMERCIAL_USE_KEY in metadata.extra for metadata in all_metadata)
        allowed = "yes" if is_known and uses == {"yes"} else "unknown"
        extra[_COMMERCIAL_USE_KEY] = "no" if "no" in uses else allowed
    return extra


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


def _join_unique(texts: Iterable[str], separator: str = ", ") -> str:
    """Join texts that are not empty, each once, in their order."""
    return separator.join(dict.fromkeys(filter(None, texts)))
