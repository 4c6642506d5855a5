"""``PairHypernetwork``: features of an image before and after an edit to the LoRA of that edit.

    Δ = H(A, A'),   H(A, A) = 0                    LoRA of Change (2411.19156, §3.2)

At initialization all Δ are 0. With an instruction head (this project's own), the target modules
that read text get a LoRA in closed form (``TextSubstitution``). It gives the empty prompt the
effect of a predicted instruction. The hypernetwork predicts the LoRA of all other modules.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.text_substitution import TextSubstitution
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.models.instruction_head import InstructionHead, InstructionHeadConfig

FUSION_WIDTHS: Final = {"concat": 2, "difference": 1, "both": 3}
"""Width of a pair's fused tokens, in widths of one image's tokens."""


class PairHypernetwork(nn.Module):
    """``Hypernetwork`` whose memory is the fused tokens of two images.

    The tokens of both images are fused patch by patch. Several pairs that show the same edit are
    views.

    With ``antisymmetric``, the ``up`` codes are (u(A, A') - u(A', A)) / 2 and the ``down`` codes
    the mean of both orders. Then Δ(A', A) = -Δ(A, A') and Δ(A, A) = 0 by construction, which LoRA
    Reverse and random exchange only train for. This does not hold for the modules that read text:
    the instruction of an edit is not the opposite of the instruction that undoes it. Both LoRAs
    undo the edit if the vocabulary has an ``undo_template`` and the base knows its prompts.

    Letters of shapes: B edits (batch), V views (pairs of one edit), N tokens per image, F
    ``feature_width``, G width of a fused token, M LoRA factors (``down`` of all targets, then
    ``up`` of all targets), K numbers per code, T text tokens, r rank, k size of the text basis, U
    prompts of the vocabulary.

    Args:
        layout: Target modules and rank of the predicted LoRAs.
        feature_width: Width of one image's tokens.
        fusion: ``concat`` for [A, A'] as in the paper, ``difference`` for A' - A, or ``both``.
        antisymmetric: Whether swapping the images negates the LoRA.
        instruction_head: Configuration of the head that predicts instructions, or the mapping that
            ``InstructionHeadConfig.from_config`` takes. None leaves all target modules to the
            hypernetwork.
        **hypernetwork_kwargs: Other arguments of ``Hypernetwork``.

    Raises:
        InvalidArgumentError: If the fusion is unknown; if ``antisymmetric`` meets a softmax basis,
            or ``patch_pixels`` another fusion than ``concat``; if no target module reads text and
            there is an instruction head.
    """

    def __init__(
        self,
        layout: LoraLayout,
        feature_width: int,
        fusion: str = "concat",
        antisymmetric: bool = False,
        instruction_head: InstructionHeadConfig | Mapping[str, Any] | None = None,
        **hypernetwork_kwargs: Any,
    ) -> None:
        super().__init__()
        if fusion not in FUSION_WIDTHS:
            raise InvalidArgumentError(
                f"unknown fusion {fusion!r}; known: {', '.join(FUSION_WIDTHS)}"
            )
        if antisymmetric and hypernetwork_kwargs.get("head") == "softmax":
            raise InvalidArgumentError(
                "weights of a softmax basis cannot change sign: antisymmetric needs another head"
            )
        if isinstance(instruction_head, Mapping):
            instruction_head = InstructionHeadConfig.from_config(instruction_head)
        if instruction_head and instruction_head.patch_pixels and fusion != "concat":
            raise InvalidArgumentError(
                "an instruction head with patch_pixels needs both images: "
                f"fusion 'concat' expected, got {fusion!r}"
            )
        self.layout, self.fusion, self.antisymmetric = layout, fusion, antisymmetric
        pair_width = FUSION_WIDTHS[fusion] * feature_width  # G
        self.instruction_head: InstructionHead | None = None
        self.text_substitution: TextSubstitution | None = None
        other_layout = layout
        if instruction_head:
            self.instruction_head = InstructionHead(pair_width, layout.rank, instruction_head)
            self.text_substitution = TextSubstitution(
                layout,
                instruction_head.num_text_tokens,
                instruction_head.cross_attention_dim,
                instruction_head.other_rank,
                self.instruction_head.text_b.shape[-1],  # k, at most cross_attention_dim
            )
            # the text projections get a closed form, so the hypernetwork has no queries for them
            other_layout = self.text_substitution.other_layout
        self.hypernetwork = Hypernetwork(other_layout, pair_width, **hypernetwork_kwargs)
        self.config: dict[str, object] = {
            **self.hypernetwork.config,
            "feature_width": feature_width,  # F; the hypernetwork's own entry is G
            "fusion": fusion,
            "antisymmetric": antisymmetric,
            "instruction_head": instruction_head.to_config() if instruction_head else None,
        }

    def predict_codes(self, before: ImageFeatures, after: ImageFeatures) -> Tensor:
        """Predict the codes of all factors that the hypernetwork is for.

        Args:
            before: Tokens of the images before the edit, [batch, pairs, tokens, feature_width].
            after: Tokens of the images after it, of the same shape.

        Returns:
            Codes of all ``down`` factors, then of all ``up`` factors: [batch, 2 * num_targets,
            code_size].
        """
        # codes of (A, A'), [B, M, K]
        forward_codes = self.hypernetwork.predict_codes(self.fuse_pair(before, after))
        if not self.antisymmetric:
            return forward_codes
        # codes of (A', A), [B, M, K]
        backward_codes = self.hypernetwork.predict_codes(self.fuse_pair(after, before))
        forward_down, forward_up = forward_codes.chunk(2, -2)  # each [B, M / 2, K]
        backward_down, backward_up = backward_codes.chunk(2, -2)  # each [B, M / 2, K]
        # One factor must keep its sign: with both negated, up @ down would not change.
        # The heads map codes of up linearly, without a bias, so -u gives -up and 0 gives ΔW = 0.
        down = (forward_down + backward_down) / 2  # symmetric
        up = (forward_up - backward_up) / 2  # antisymmetric, and so is up @ down
        return torch.cat([down, up], -2)  # [B, M, K]

    def forward(self, before: ImageFeatures, after: ImageFeatures) -> LoraWeights:
        """Predict one LoRA per edit.

        Args:
            before: Tokens of the images before the edit, [batch, pairs, tokens, feature_width].
            after: Tokens of the images after it, of the same shape.

        Returns:
            LoRAs with a batch axis [batch].
        """
        # per target down [B, r, in] and up [B, out, r]; at other_rank with an instruction head
        weights = self.hypernetwork.decode_codes(self.predict_codes(before, after))
        if self.text_substitution is None:
            return weights
        a, b = self.predict_prompt_factors(before, after)  # [B, T, r], [B, r, k]
        # ΔW = (W bᵀ) (aᵀ e(∅)⁺ᵀ) at the text projections, in the order of the whole layout
        return self.text_substitution(a, b, weights)

    def predict_prompt_factors(
        self, before: ImageFeatures, after: ImageFeatures
    ) -> tuple[Tensor, Tensor]:
        """Predict the instruction, as the factors that ``TextSubstitution`` takes.

        Args:
            before: Tokens of the images before the edit, [batch, pairs, tokens, feature_width].
            after: Tokens of the images after it, of the same shape.

        Returns:
            a [batch, num_text_tokens, rank] and b [batch, rank, basis_size].

        Raises:
            InvalidArgumentError: If the network has no instruction head.
        """
        # The second pair of each shows no edit. What the head reads there is subtracted.
        features = self.fuse_pair(before, after), self.fuse_pair(before, before)
        reversed_features = self.fuse_pair(after, before), self.fuse_pair(after, after)
        a, b = self._require_instruction_head()(features, reversed_features)
        return a, b  # [B, T, r], [B, r, k]

    def predict_instructions(self, before: ImageFeatures, after: ImageFeatures) -> list[str]:
        """Predict the instruction of each edit as text.

        Args:
            before: Tokens of the images before the edit, [batch, pairs, tokens, feature_width].
            after: Tokens of the images after it, of the same shape.

        Returns:
            One instruction per edit, or a blend of some; empty where nothing changes.

        Raises:
            InvalidArgumentError: If the network has no instruction head.
        """
        head = self._require_instruction_head()
        prompt_weights = head.predict_prompt_weights(
            self.fuse_pair(before, after), self.fuse_pair(before, before)
        )  # [B, U]
        return head.vocabulary.decode(prompt_weights)

    def fuse_pair(self, before: ImageFeatures, after: ImageFeatures) -> ImageFeatures:
        """Fuse the tokens of two images, patch by patch.

        Args:
            before: Tokens of the images before the edit, [batch, pairs, tokens, feature_width].
            after: Tokens of the images after it, of the same shape.

        Returns:
            Tokens [batch, pairs, tokens, ``FUSION_WIDTHS[fusion]`` * feature_width].
        """
        # Token n of A lies beside token n of A', so both images must be aligned.
        difference = after.tokens - before.tokens  # [B, V, N, F]
        parts = {
            "concat": (before.tokens, after.tokens),  # G = 2 F, as in the paper
            "difference": (difference,),  # G = F; blind to what does not change
            "both": (before.tokens, after.tokens, difference),  # G = 3 F
        }[self.fusion]
        return ImageFeatures(torch.cat(parts, -1))  # [B, V, N, G]

    def _require_instruction_head(self) -> InstructionHead:
        if self.instruction_head is None:
            raise InvalidArgumentError(
                "this network has no instruction head: build it with "
                "instruction_head={'num_text_tokens': ..., 'cross_attention_dim': ...}"
            )
        return self.instruction_head
