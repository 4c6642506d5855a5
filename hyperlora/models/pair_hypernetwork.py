"""``PairHypernetwork``: features of a picture before and after an edit to the LoRA that makes the same edit elsewhere.

Δ = H(A, A'),   H(A, A) and, at initialisation, all Δ are 0        LoRA of Change (2411.19156, §3.2)
With ``words``, sites that read text say the words that would ask for the edit (``TextSubstitution``): this project's own.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn

from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.text_substitution import TextSubstitution
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.models.instruction_head import InstructionHead

FUSION_WIDTHS: Final = {"concat": 2, "difference": 1, "both": 3}
"""How many times as wide as one picture's tokens those of a pair are."""


class PairHypernetwork(nn.Module):
    """Tokens of both pictures, joined place by place, as the memory of a ``Hypernetwork``; several pairs that show the
    same edit are views.

    ``fusion``: ``concat`` (A, A') as in the paper, ``difference`` (A' - A), or ``both``. With ``antisymmetric`` the
    ``up`` factors are u(A, A') - u(A', A) and the ``down`` factors the mean of both orders, so that Δ(A', A) is
    -Δ(A, A') and Δ(A, A) is 0 by construction: what LoRA Reverse and random exchange train for. Other arguments are the
    ``Hypernetwork``'s.

    ``words`` (``tokens`` and ``width`` of the base's text, ``rest``, the rank of all other sites, and options of
    ``InstructionHead``, its ``build_vocabulary`` among them) gives the sites that read text to a network of their own, which is
    taught by instructions alone. Their LoRA is 0 where nothing changes too, but the words for a change are not the
    opposite of those for its undoing: there Δ(A', A) is not -Δ(A, A'), though both undo it if the vocabulary has words
    for the way ``back`` (and the base knows them).
    """

    def __init__(
        self,
        layout: LoraLayout,
        feature_width: int,
        fusion: str = "concat",
        antisymmetric: bool = False,
        instruction_head: dict[str, Any] | None = None,
        **hypernetwork_kwargs: Any,
    ) -> None:
        super().__init__()
        if fusion not in FUSION_WIDTHS:
            raise InvalidArgumentError(
                f"unknown way to join a pair {fusion!r}; known: {', '.join(FUSION_WIDTHS)}"
            )
        if antisymmetric and hypernetwork_kwargs.get("head") == "softmax":
            raise InvalidArgumentError(
                "shares of a softmax basis cannot change sign: antisymmetric needs another head"
            )
        if instruction_head and instruction_head.get("pixels") and fusion != "concat":
            raise InvalidArgumentError(
                f"words that point at pixels need both pictures: join 'concat' expected, got {fusion!r}"
            )
        self.layout, self.fusion, self.antisymmetric = layout, fusion, antisymmetric
        pair_width = FUSION_WIDTHS[fusion] * feature_width
        head_kwargs = {k: v for k, v in (instruction_head or {}).items() if k != "rest"}
        self.instruction_head = (
            InstructionHead(pair_width, rank=layout.rank, **head_kwargs)
            if instruction_head
            else None
        )
        self.text_substitution = None
        if instruction_head and self.instruction_head:
            self.text_substitution = TextSubstitution(
                layout,
                instruction_head["tokens"],
                instruction_head["width"],
                instruction_head.get("rest"),
                self.instruction_head.text_b.shape[-1],
            )
        self.hypernetwork = Hypernetwork(
            self.text_substitution.other_layout if self.text_substitution else layout,
            pair_width,
            **hypernetwork_kwargs,
        )
        hypernetwork_config = {
            k: v for k, v in self.hypernetwork.config.items() if k != "feature_width"
        }
        self.config = {
            "feature_width": feature_width,
            "join": fusion,
            "antisymmetric": antisymmetric,
            "words": instruction_head,
            **hypernetwork_config,
        }

    def predict_codes(self, before: ImageFeatures, after: ImageFeatures) -> Tensor:
        """[batch, 2 * sites, code_size], of the sites that are not given words."""
        forward_codes = self.hypernetwork.predict_codes(self.fuse_pair(before, after))
        if not self.antisymmetric:
            return forward_codes
        backward_codes = self.hypernetwork.predict_codes(self.fuse_pair(after, before))
        (down, up), (backward_down, backward_up) = (
            forward_codes.chunk(2, -2),
            backward_codes.chunk(2, -2),
        )
        return torch.cat([(down + backward_down) / 2, (up - backward_up) / 2], -2)

    def forward(self, before: ImageFeatures, after: ImageFeatures) -> LoraWeights:
        """One LoRA per edit of the batch; both [batch, pairs, tokens, width]."""
        weights = self.hypernetwork.decode_codes(self.predict_codes(before, after))
        if self.text_substitution is None:
            return weights
        return self.text_substitution(*self.predict_prompt_factors(before, after), weights)

    def predict_prompt_factors(
        self, before: ImageFeatures, after: ImageFeatures
    ) -> tuple[Tensor, Tensor]:
        """``a`` [batch, tokens, rank] and ``b`` [batch, rank, basis] of ``TextSubstitution``. Raises ``InvalidArgumentError`` if the
        network was built without ``words``."""
        pair_features = self.fuse_pair(before, after), self.fuse_pair(before, before)
        return self._instruction_head_or_raise(
            pair_features, (self.fuse_pair(after, before), self.fuse_pair(after, after))
        )

    def predict_instructions(self, before: ImageFeatures, after: ImageFeatures) -> list[str]:
        """What would ask for each change of the batch. Raises ``InvalidArgumentError`` as ``words``."""
        instruction_head = self._instruction_head_or_raise
        return instruction_head.vocabulary.decode(
            instruction_head.predict_prompt_weights(
                self.fuse_pair(before, after), self.fuse_pair(before, before)
            )
        )

    @property
    def _instruction_head_or_raise(self) -> InstructionHead:
        if self.instruction_head is None:
            raise InvalidArgumentError(
                "this network has no words: build it with words={'tokens': ..., 'width': ...}"
            )
        return self.instruction_head

    def fuse_pair(self, before: ImageFeatures, after: ImageFeatures) -> ImageFeatures:
        """What the decoder sees of a pair."""
        before_tokens, after_tokens = before.tokens, after.tokens
        tokens = {
            "concat": (before_tokens, after_tokens),
            "difference": (after_tokens - before_tokens,),
            "both": (before_tokens, after_tokens, after_tokens - before_tokens),
        }[self.fusion]
        return ImageFeatures(torch.cat(tokens, -1))
