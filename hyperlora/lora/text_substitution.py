"""``TextSubstitution``: words as a LoRA, at the sites of a denoiser that read its text.

e(∅) (W + ΔW)ᵀ = e(words) Wᵀ      ΔW = (W bᵀ) (aᵀ e(∅)⁺ᵀ),   a b ≈ e(words) - e(∅)   [tokens, rank] [rank, width]

The tokens of the empty text are linearly independent, so each can be made to say anything: the LoRA gives it the keys
and values of another word, as exactly as the rank allows. One ``a`` and ``b`` serve all sites: what a LoRA says is a
text, and can be learned from texts alone, without the denoiser.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights

PINV_RTOL: Final = 3e-5
"""Directions in which the empty text's tokens differ by less, of the most, are left out: half precision ends there."""


class TextSubstitution(nn.Module):
    """The sites of ``layout`` that read text of ``cross_attention_dim`` numbers a token, ``num_tokens`` tokens, and all that ΔW needs to
    know of the base (``set_base``). The other sites may use fewer of the layout's rank, ``rest``: words need more. Words
    may be told in a ``basis_size`` of fewer directions than ``cross_attention_dim``.

    Raises ``InvalidArgumentError`` if the layout has no such site, or ``rest`` is more than its rank.
    """

    empty_text_pinv: Tensor

    def __init__(
        self,
        layout: LoraLayout,
        num_tokens: int,
        cross_attention_dim: int,
        other_rank: int | None = None,
        basis_size: int | None = None,
    ) -> None:
        super().__init__()
        self.layout, self.num_tokens, self.cross_attention_dim, self.other_rank = (
            layout,
            num_tokens,
            cross_attention_dim,
            other_rank or layout.rank,
        )
        if self.other_rank > layout.rank:
            raise InvalidArgumentError(
                f"sites that read no text cannot be of rank {other_rank}: the whole LoRA is of {layout.rank}"
            )
        self.target_indices = [
            i
            for i, target in enumerate(layout.targets)
            if target.is_text_projection and target.in_features == cross_attention_dim
        ]
        if not self.target_indices:
            raise InvalidArgumentError(
                f"no site of the layout reads text of width {cross_attention_dim}: leave words out"
            )
        self.register_buffer("said", torch.zeros(num_tokens, cross_attention_dim))  # pinv(e(∅)ᵀ)
        for i, target in enumerate(self.targets):
            self.register_buffer(
                f"weight{i}", torch.zeros(target.out_features, basis_size or cross_attention_dim)
            )

    @property
    def targets(self) -> list[TargetModule]:
        return [self.layout.targets[i] for i in self.target_indices]

    @property
    def other_layout(self) -> LoraLayout:
        """The layout without these sites, of rank ``rest``."""
        other_targets = (
            target for i, target in enumerate(self.layout.targets) if i not in self.target_indices
        )
        return LoraLayout(tuple(other_targets), self.other_rank, self.layout.base)

    @torch.no_grad()
    def set_base(
        self, empty_prompt_embeds: Tensor, weights: Sequence[Tensor], basis: Tensor | None = None
    ) -> None:
        """``empty_prompt_embeds`` [tokens, width], the base's embedding of the empty text; ``weights`` of ``targets``, in order; the
        ``basis_size`` [directions, width] that words are told in, orthonormal."""
        self.empty_text_pinv.copy_(
            torch.linalg.pinv(empty_prompt_embeds.double().mT, rtol=PINV_RTOL)
        )
        for i, weight in enumerate(weights):
            self.get_buffer(f"weight{i}").copy_(
                weight if basis is None else weight @ basis.to(weight).mT
            )

    def forward(self, a: Tensor, b: Tensor, other_loras: LoraWeights) -> LoraWeights:
        """``a`` [*batch, tokens, rank] and ``b`` [*batch, rank, basis] at these sites, ``rest`` at the others."""
        with torch.autocast(a.device.type, enabled=False):
            text_down = a.float().mT @ self.empty_text_pinv
            text_factors = {
                index: (text_down, weight @ b.float().mT) for index, weight in self._get_weights()
            }
        num_pad = self.layout.rank - self.other_rank
        other_factors = (
            (F.pad(d, (0, 0, 0, num_pad)), F.pad(u, (0, num_pad)))
            for d, u in zip(other_loras.down, other_loras.up, strict=True)
        )
        factors = (
            text_factors.get(i) or next(other_factors) for i in range(len(self.layout.targets))
        )
        down, up = zip(*factors, strict=True)
        return LoraWeights(self.layout, down, up)

    def factorize(self, embeds_offset: Tensor) -> tuple[Tensor, Tensor]:
        """The ``a`` and ``b`` of the layout's rank that are nearest to ``wanted`` [*batch, tokens, width] (Eckart and
        Young)."""
        return compute_low_rank_factors(embeds_offset, self.layout.rank)

    def _get_weights(self) -> Iterator[tuple[int, Tensor]]:
        """Of each site its place in the layout and its weight."""
        return (
            (index, self.get_buffer(f"weight{i}")) for i, index in enumerate(self.target_indices)
        )


def compute_low_rank_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[*batch, m, rank] and [*batch, rank, n], whose product is nearest to ``wanted`` [*batch, m, n] (Eckart and
    Young); zeros where there is more rank than to say."""
    left, scale, right = torch.linalg.svd(matrix, full_matrices=False)
    root, num_pad = scale.sqrt(), rank - scale.shape[-1]  # below 0 the last are left out
    return F.pad(left * root[..., None, :], (0, num_pad)), F.pad(
        root[..., None] * right, (0, 0, 0, num_pad)
    )
