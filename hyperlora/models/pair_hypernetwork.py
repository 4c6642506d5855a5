"""``ChangeNetwork``: features of a picture before and after an edit to the LoRA that makes the same edit elsewhere.

Δ = H(A, A'),   H(A, A) and, at initialisation, all Δ are 0        LoRA of Change (2411.19156, §3.2)
With ``words``, sites that read text say the words that would ask for the edit (``WordSites``): this project's own.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn

from hyperlora.errors import BadRequest
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.text_substitution import WordSites
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.models.instruction_head import Wording

JOINS: Final = {"concat": 2, "difference": 1, "both": 3}
"""How many times as wide as one picture's tokens those of a pair are."""


class ChangeNetwork(nn.Module):
    """Tokens of both pictures, joined place by place, as the memory of a ``Hypernetwork``; several pairs that show the
    same edit are views.

    ``join``: ``concat`` (A, A') as in the paper, ``difference`` (A' - A), or ``both``. With ``antisymmetric`` the
    ``up`` factors are u(A, A') - u(A', A) and the ``down`` factors the mean of both orders, so that Δ(A', A) is
    -Δ(A, A') and Δ(A, A) is 0 by construction: what LoRA Reverse and random exchange train for. Other arguments are the
    ``Hypernetwork``'s.

    ``words`` (``tokens`` and ``width`` of the base's text, ``rest``, the rank of all other sites, and options of
    ``Wording``, its ``vocabulary`` among them) gives the sites that read text to a network of their own, which is
    taught by instructions alone. Their LoRA is 0 where nothing changes too, but the words for a change are not the
    opposite of those for its undoing: there Δ(A', A) is not -Δ(A, A'), though both undo it if the vocabulary has words
    for the way ``back`` (and the base knows them).
    """

    def __init__(
        self,
        layout: LoraLayout,
        feature_width: int,
        join: str = "concat",
        antisymmetric: bool = False,
        words: dict[str, Any] | None = None,
        **decoder: Any,
    ) -> None:
        super().__init__()
        if join not in JOINS:
            raise BadRequest(f"unknown way to join a pair {join!r}; known: {', '.join(JOINS)}")
        if antisymmetric and decoder.get("head") == "softmax":
            raise BadRequest("shares of a softmax basis cannot change sign: antisymmetric needs another head")
        if words and words.get("pixels") and join != "concat":
            raise BadRequest(f"words that point at pixels need both pictures: join 'concat' expected, got {join!r}")
        self.layout, self.join, self.antisymmetric = layout, join, antisymmetric
        width = JOINS[join] * feature_width
        told = {k: v for k, v in (words or {}).items() if k != "rest"}
        self.wording = Wording(width, rank=layout.rank, **told) if words else None
        self.sites = None
        if words and self.wording:
            self.sites = WordSites(
                layout, words["tokens"], words["width"], words.get("rest"), self.wording.text_b.shape[-1]
            )
        self.hypernetwork = Hypernetwork(self.sites.others if self.sites else layout, width, **decoder)
        inner = {k: v for k, v in self.hypernetwork.config.items() if k != "feature_width"}
        self.config = {
            "feature_width": feature_width, "join": join, "antisymmetric": antisymmetric, "words": words, **inner,
        }  # fmt: skip

    def codes(self, before: ImageFeatures, after: ImageFeatures) -> Tensor:
        """[batch, 2 * sites, code_size], of the sites that are not given words."""
        forward = self.hypernetwork.codes(self.joined(before, after))
        if not self.antisymmetric:
            return forward
        backward = self.hypernetwork.codes(self.joined(after, before))
        (down, up), (other_down, other_up) = forward.chunk(2, -2), backward.chunk(2, -2)
        return torch.cat([(down + other_down) / 2, (up - other_up) / 2], -2)

    def forward(self, before: ImageFeatures, after: ImageFeatures) -> LoraWeights:
        """One LoRA per edit of the batch; both [batch, pairs, tokens, width]."""
        weights = self.hypernetwork.expand(self.codes(before, after))
        if self.sites is None:
            return weights
        return self.sites(*self.words(before, after), weights)

    def words(self, before: ImageFeatures, after: ImageFeatures) -> tuple[Tensor, Tensor]:
        """``a`` [batch, tokens, rank] and ``b`` [batch, rank, basis] of ``WordSites``. Raises ``BadRequest`` if the
        network was built without ``words``."""
        change = self.joined(before, after), self.joined(before, before)
        return self._wording(change, (self.joined(after, before), self.joined(after, after)))

    def instructions(self, before: ImageFeatures, after: ImageFeatures) -> list[str]:
        """What would ask for each change of the batch. Raises ``BadRequest`` as ``words``."""
        wording = self._wording
        return wording.vocabulary.told(wording.weights(self.joined(before, after), self.joined(before, before)))

    @property
    def _wording(self) -> Wording:
        if self.wording is None:
            raise BadRequest("this network has no words: build it with words={'tokens': ..., 'width': ...}")
        return self.wording

    def joined(self, before: ImageFeatures, after: ImageFeatures) -> ImageFeatures:
        """What the decoder sees of a pair."""
        a, b = before.tokens, after.tokens
        parts = {"concat": (a, b), "difference": (b - a,), "both": (a, b, b - a)}[self.join]
        return ImageFeatures(torch.cat(parts, -1))
