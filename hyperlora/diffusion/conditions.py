"""Conditions of a denoiser: its keyword arguments for prompts, and a map over nested tensors."""

from collections.abc import Callable, Mapping
from typing import Any, Required, TypedDict, TypeVar, cast

from torch import Tensor

T = TypeVar("T")


class PromptConditions(TypedDict, total=False):
    """Keyword arguments that a denoiser takes for n prompts.

    Collections of several subjects have further axes before n.
    """

    encoder_hidden_states: Required[Tensor]
    """Prompt embeddings [n, tokens, width]."""
    added_cond_kwargs: dict[str, Tensor]
    """SDXL: pooled prompt embeddings ``text_embeds`` [n, width] and ``time_ids`` [n, 6], the
    original size, the crop offset and the target size in pixels."""
    pooled_projections: Tensor
    """Pooled prompt embeddings [n, width] (SD 3, FLUX)."""


class EditConditions(PromptConditions, total=False):
    """Conditions of a base that edits images (InstructPix2Pix, 2211.09800)."""

    cond_latents: Tensor
    """Latents of the input image [n, c, h, w], concatenated to the noisy latents."""


def map_tensors(fn: Callable[..., Tensor], tree: T, *others: T) -> T:
    """Apply ``fn`` to corresponding tensors of nested mappings.

    Args:
        fn: Takes one tensor of each tree and returns a tensor.
        tree: A tensor, or mappings of names to tensors or further mappings.
        others: Trees with the same keys.

    Returns:
        A tree with the same keys that holds the results.
    """

    def map_node(*nodes: Any) -> Any:  # noqa: ANN401 - a tree of any depth
        """Map one tensor of each tree, or corresponding mappings."""
        if isinstance(nodes[0], Mapping):
            return {key: map_node(*(node[key] for node in nodes)) for key in nodes[0]}
        return fn(*nodes)

    return cast(T, map_node(tree, *others))
