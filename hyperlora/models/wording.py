"""``Wording``: features of a picture before and after an edit to the words that would ask for it, of low rank.

a(A, A') [tokens, rank],   b(A, A') - b(A, A) [rank, width];   b is 0 at initialisation, and for a pair without change
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.features import ImageFeatures


class Wording(nn.Module):
    """A residual network over what is seen of a pair, ``feature_width`` numbers at each of ``places`` (more tokens are
    averaged to so many); several pairs of the same edit are averaged where their words are chosen. While it learns what
    is usual of each number, ``noise`` times that is added."""

    def __init__(
        self,
        feature_width: int,
        tokens: int,
        width: int,
        rank: int,
        places: int = 4,
        hidden: int = 288,
        depth: int = 2,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.noise = noise
        self.tokens, self.rank, self.places = tokens, rank, places
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
        self.where = nn.Linear(hidden, tokens * rank)
        self.what = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, narrow), nn.Linear(narrow, rank * width))
        nn.init.normal_(self.where.bias, std=0.2)
        for parameter in self.what[2].parameters():
            nn.init.zeros_(parameter)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What is neither the last layer nor a vector."""
        parts = (self.place, self.whole, self.blocks, self.what[1])
        return [p for part in parts for p in part.parameters() if p.ndim == 2]

    def forward(self, pair: ImageFeatures, nothing: ImageFeatures) -> tuple[Tensor, Tensor]:
        """``pair`` holds (A, A'), ``nothing`` (A, A), joined: a [batch, tokens, rank] and b [batch, rank, width]."""
        meant, still = self._meaning(pair), self._meaning(nothing)
        where = self.where(meant).unflatten(-1, (self.tokens, self.rank))
        return where, (self.what(meant) - self.what(still)).unflatten(-1, (self.rank, -1))

    def _meaning(self, pair: ImageFeatures) -> Tensor:
        """[batch, hidden]."""
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
        return seen.mean(1)
