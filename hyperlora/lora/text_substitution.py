"""``TextSubstitution``: LoRAs that make the empty prompt act as another prompt.

A cross-attention layer projects text embeddings e [tokens, width] to keys or values by e Wᵀ.
With the LoRA, the empty prompt ∅ gives the projections of another prompt p:

    e(∅) (W + ΔW)ᵀ = e(p) Wᵀ
    a b ≈ e(p) - e(∅)              a [tokens, rank], b [rank, width], factors of the offset
    ΔW = (W bᵀ) (aᵀ e(∅)⁺ᵀ)        up = W bᵀ [out, rank], down = aᵀ e(∅)⁺ᵀ [rank, width]

The token embeddings of the empty prompt are linearly independent, so e(∅) e(∅)⁺ = I and the
equation holds as exactly as the rank allows. One pair (a, b) serves all layers, so it can be
learned from texts alone, without running the denoiser.

Shapes in comments: *B is any number of batch axes, r the rank, width ``cross_attention_dim``,
basis ``basis_size``.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from hyperlora.compute import disable_autocast
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.factors import compute_low_rank_factors, pad_factors
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights

PINV_RTOL: Final = 3e-5
"""Singular values of e(∅) below this share of the largest are dropped: float16 resolves no more."""


class TextSubstitution(nn.Module):
    """The closed-form LoRA of a text offset, at all text projections of a layout.

    Args:
        layout: The targets and the rank.
        num_tokens: Tokens of a prompt.
        cross_attention_dim: Width of a token's embedding.
        other_rank: The rank at targets that are no text projections, at most the layout's and by
            default the layout's.
        basis_size: Directions of the basis in which offsets are given, by default
            ``cross_attention_dim`` (the embedding itself).

    Attributes:
        target_indices: Indices in the layout of the text projections.
        empty_text_pinv: pinv(e(∅)ᵀ), [num_tokens, cross_attention_dim].

    Raises:
        InvalidArgumentError: The layout has no text projection of that width, or ``other_rank``
            exceeds its rank.
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
        self.layout = layout
        self.num_tokens = num_tokens
        self.cross_attention_dim = cross_attention_dim
        self.other_rank = other_rank or layout.rank
        if self.other_rank > layout.rank:
            raise InvalidArgumentError(
                f"other targets cannot be of rank {other_rank}: the whole LoRA is of {layout.rank}"
            )
        self.target_indices = [
            i
            for i, target in enumerate(layout.targets)
            if target.is_text_projection and target.in_features == cross_attention_dim
        ]
        if not self.target_indices:
            raise InvalidArgumentError(
                f"no target of the layout is a text projection of width {cross_attention_dim}: "
                f"leave out the instruction head"
            )
        # zeros until ``set_base`` or a checkpoint fills them
        self.register_buffer("empty_text_pinv", torch.zeros(num_tokens, cross_attention_dim))
        for i, target in enumerate(self.targets):
            # [out, basis]: W Bᵀ with the basis B of the offsets, or W itself
            weight = torch.zeros(target.out_features, basis_size or cross_attention_dim)
            self.register_buffer(f"weight{i}", weight)

    @property
    def targets(self) -> list[TargetModule]:
        """Text projections of the layout, in order."""
        return [self.layout.targets[i] for i in self.target_indices]

    @property
    def other_layout(self) -> LoraLayout:
        """Layout of all other targets, at ``other_rank``."""
        other_targets = tuple(
            target for i, target in enumerate(self.layout.targets) if i not in self.target_indices
        )
        return LoraLayout(other_targets, self.other_rank, self.layout.base)

    @torch.no_grad()
    def set_base(
        self, empty_prompt_embeds: Tensor, weights: Sequence[Tensor], basis: Tensor | None = None
    ) -> None:
        """Store what ΔW needs of the base model.

        Args:
            empty_prompt_embeds: e(∅), [num_tokens, cross_attention_dim].
            weights: W of every target in ``targets``, [out_features, cross_attention_dim] each.
            basis: Orthonormal directions in which offsets are given, [basis_size,
                cross_attention_dim]; None if they are given in the embedding itself.
        """
        # pinv(eᵀ) = (e⁺)ᵀ. Tokens of the empty prompt are alike: the largest singular value can be
        # 10⁴ times the smallest, which costs four of the seven digits of float32.
        # On the CPU, since MPS has no float64.
        pinv = torch.linalg.pinv(empty_prompt_embeds.cpu().double().mT, rtol=PINV_RTOL)
        self.empty_text_pinv.copy_(pinv)  # [tokens, width]
        for i, weight in enumerate(weights):
            # offset = a b B gives (W Bᵀ) bᵀ for up, so B is multiplied in once, here
            projected = weight if basis is None else weight @ basis.to(weight).mT  # [out, basis]
            self.get_buffer(f"weight{i}").copy_(projected)

    def forward(self, a: Tensor, b: Tensor, other_loras: LoraWeights) -> LoraWeights:
        """Compute the LoRAs of text offsets a b, joined with LoRAs at the other targets.

        Args:
            a: [*batch, num_tokens, rank].
            b: [*batch, rank, basis_size].
            other_loras: LoRAs over ``other_layout``, of batch shape [*batch].

        Returns:
            LoRAs over ``layout``, of batch shape [*batch].
        """
        factors: dict[int, tuple[Tensor, Tensor]] = {}
        # large numbers cancel in e(∅) e(∅)⁺ = I; with the avatars base, bfloat16 is off by 0.4
        with disable_autocast(a.device):
            # aᵀ e(∅)⁺ᵀ, the same at all text projections: [*B, r, tokens] @ [tokens, width]
            text_down = a.float().mT @ self.empty_text_pinv  # [*B, r, width]
            for index, weight in self._iterate_weights():
                # W bᵀ: [out, basis] @ [*B, basis, r]
                text_up = weight @ b.float().mT  # [*B, out, r]
                factors[index] = (text_down, text_up)
        # targets of ``other_layout`` keep their order, so an iterator fills the gaps
        other_factors = zip(other_loras.down, other_loras.up, strict=True)
        for index in range(len(self.layout.targets)):
            if index not in factors:
                # from other_rank to r, with zeros
                factors[index] = pad_factors(*next(other_factors), self.layout.rank)
        downs, ups = zip(*(factors[i] for i in range(len(self.layout.targets))), strict=True)
        return LoraWeights(self.layout, downs, ups)

    def factorize(self, embeds_offset: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the nearest a b of the layout's rank (Eckart and Young).

        Args:
            embeds_offset: e(p) - e(∅), [*batch, num_tokens, width].

        Returns:
            ``a`` [*batch, num_tokens, rank] and ``b`` [*batch, rank, width].
        """
        # [*B, tokens, width] ≈ [*B, tokens, r] @ [*B, r, width]
        return compute_low_rank_factors(embeds_offset, self.layout.rank)

    def _iterate_weights(self) -> Iterator[tuple[int, Tensor]]:
        """Index in the layout and W [out, basis_size] of every text projection."""
        for i, index in enumerate(self.target_indices):
            yield index, self.get_buffer(f"weight{i}")
