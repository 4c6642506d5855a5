"""Conditions of a denoiser: encoded prompts and input images, and operations on batches of them."""

from collections.abc import Callable, Sequence
from typing import Required, TypedDict, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.compute import disable_autocast


class Conditions(TypedDict, total=False):
    """What a denoiser is told besides noisy latents and time, by the names of diffusers' pipelines.

    Embeddings of n prompts and, of a base that edits images, the input images. Collections of
    several subjects have further axes before n.
    """

    prompt_embeds: Required[Tensor]
    """Prompt embeddings [n, tokens, width]."""
    prompt_embeds_mask: Tensor
    """Which tokens belong to the prompt [n, tokens]; of families that do not fix their number."""
    pooled_prompt_embeds: Tensor
    """Pooled prompt embeddings [n, width] (SDXL, SD 3, FLUX.1)."""
    image_latents: Tensor
    """Scaled latents of the input images [n, c, h, w] (InstructPix2Pix, Kontext, FLUX.2)."""


def map_tensors(
    fn: Callable[..., Tensor], conditions: Conditions, *others: Conditions
) -> Conditions:
    """Apply ``fn`` to corresponding tensors.

    Args:
        fn: Takes one tensor of each argument and returns a tensor.
        conditions: The first.
        others: Further ones with the same keys.

    Returns:
        Conditions with the same keys that hold the results.
    """
    values = {
        key: fn(value, *(cast(dict[str, Tensor], other)[key] for other in others))
        for key, value in cast(dict[str, Tensor], conditions).items()
    }
    return cast(Conditions, values)


def pad_tokens(conditions: Sequence[Conditions]) -> list[Conditions]:
    """Pad the token axis of embeddings and masks to the longest, by zeros.

    Args:
        conditions: Their embeddings are [..., tokens, width] with any number of tokens.

    Returns:
        The same with equal numbers of tokens.
    """
    num_tokens = max(item["prompt_embeds"].shape[-2] for item in conditions)
    padded = []
    for item in conditions:
        missing = num_tokens - item["prompt_embeds"].shape[-2]
        copy = item.copy()
        copy["prompt_embeds"] = F.pad(item["prompt_embeds"], (0, 0, 0, missing))
        if "prompt_embeds_mask" in item:
            copy["prompt_embeds_mask"] = F.pad(item["prompt_embeds_mask"], (0, missing))
        padded.append(copy)
    return padded


def cat_conditions(conditions: Sequence[Conditions], dim: int = 0) -> Conditions:
    """Concatenate conditions along a batch axis, padding their tokens.

    Args:
        conditions: With the same keys.
        dim: The axis.

    Returns:
        All of them.
    """
    first, *others = pad_tokens(conditions)
    return map_tensors(lambda *tensors: torch.cat(tensors, dim), first, *others)


def blend_conditions(conditions: Conditions, weights: Tensor) -> Conditions:
    """Mix the embeddings of p prompts linearly.

    Args:
        conditions: Of p prompts.
        weights: One row of factors for each of the n mixtures, [n, p].

    Returns:
        Conditions of the n mixtures; a token is masked only if all its prompts mask it.
    """

    def mix_rows(values: Tensor) -> Tensor:
        """Mix the rows [p, ...] of one tensor to [n, ...]."""
        # embeddings of similar prompts differ by less than half precision resolves
        with disable_autocast(values.device):
            if values.dtype == torch.bool:
                return ((weights != 0).float() @ values.float()) > 0  # [n, tokens]
            return torch.einsum("np,p...->n...", weights, values.float()).to(values.dtype)

    return map_tensors(mix_rows, conditions)
