"""``Wording``: features of a picture before and after an edit to the words that would ask for it, of low rank.

w(A, A') - w(A, A) of the prompts of a ``Vocabulary``;   0 at initialisation, and for a pair without change
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.features import ImageFeatures
from hyperlora.lora.words import low_rank
from hyperlora.models.vocabulary import Vocabulary


class Wording(nn.Module):
    """A residual network over what is seen of a pair, ``feature_width`` numbers at each of ``places`` (more tokens are
    averaged to so many), that says which prompts of a ``vocabulary`` ask for the change; several pairs of the same edit
    are averaged where that is chosen. While it learns what is usual of each number, ``noise`` times that is added.

    It decides: a little of many prompts is nothing that a base was told before. So it learns from what is said
    (``Vocabulary.loss``), not through the base. ``learn`` tells it the base's texts, which it keeps at ``rank``.
    """

    text_a: Tensor
    text_b: Tensor

    def __init__(
        self,
        feature_width: int,
        tokens: int,
        width: int,
        rank: int,
        vocabulary: Mapping[str, Any],
        places: int = 4,
        hidden: int = 288,
        depth: int = 2,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.vocabulary = Vocabulary.of(vocabulary)
        self.noise, self.rank, self.places = noise, rank, places
        narrow = hidden // 3
        self.usual = nn.BatchNorm1d(feature_width, affine=False)
        self.place = nn.Sequential(nn.Linear(feature_width, narrow), nn.GELU())
        self.whole = nn.Linear(places * narrow, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden), nn.Linear(hidden, hidden // 2), nn.GELU(), nn.Linear(hidden // 2, hidden)
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(hidden)
        self.what = nn.Linear(hidden, sum(self.vocabulary.sizes))
        nn.init.zeros_(self.what.weight)
        nn.init.zeros_(self.what.bias)
        prompts = len(self.vocabulary.prompts)
        self.register_buffer("text_a", torch.zeros(prompts, tokens, rank))
        self.register_buffer("text_b", torch.zeros(prompts, rank, width))

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What is neither the last layer nor a vector."""
        return [p for part in (self.place, self.whole, self.blocks) for p in part.parameters() if p.ndim == 2]

    @torch.no_grad()
    def learn(self, texts: Tensor) -> None:
        """``texts`` [prompts, tokens, width]: e(prompt) - e(∅) of the vocabulary's prompts."""
        a, b = low_rank(texts, self.rank)
        self.text_a.copy_(a)
        self.text_b.copy_(b)

    @torch.no_grad()
    def forward(self, pair: ImageFeatures, nothing: ImageFeatures) -> tuple[Tensor, Tensor]:
        """``pair`` holds (A, A'), ``nothing`` (A, A), joined: a [batch, tokens, rank] and b [batch, rank, width]."""
        weights = self.vocabulary.weights(self.said(pair)) - self.vocabulary.weights(self.said(nothing))
        with torch.autocast(weights.device.type, enabled=False):
            return low_rank(torch.einsum("np,ptr,prw->ntw", weights.float(), self.text_a, self.text_b), self.rank)

    def said(self, pair: ImageFeatures) -> Tensor:
        """[batch, numbers], as ``Vocabulary`` reads them."""
        tokens = pair.tokens
        if tokens.shape[-2] != self.places:
            batch, views = tokens.shape[:2]
            tokens = F.adaptive_avg_pool1d(tokens.flatten(0, 1).mT, self.places).mT.unflatten(0, (batch, views))
        usual = self.usual(tokens.flatten(0, 2)).view_as(tokens)  # colours and features are of different sizes
        if self.usual.training:
            usual = usual + self.noise * torch.randn_like(usual)
        seen = self.whole(self.place(usual).flatten(-2))
        for block in self.blocks:
            seen = seen + block(seen)
        return self.what(self.norm(seen.mean(1)))
