"""``Pointing``: a colour is not remembered but pointed at: where in the picture it is seen, and what is seen there."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.errors import BadRequest
from hyperlora.features import ImageFeatures
from hyperlora.lora.text_substitution import low_rank
from hyperlora.models.instruction_vocabulary import Vocabulary

_WIDTH: Final = 16
"""Of the attention; a place is told from others by where it is, what colour it has and how that changed."""


class Pointing(nn.Module):
    """One look at a small picture for each of several things to be said of it: attention over its pixels, and what is
    read from the colour found there, ``numbers[i]`` numbers of look i, linear in it; 0 at initialisation.

    The small picture is what a ``VisionEncoder`` with ``colours`` puts beside its tokens: ``across``² pixels at each of
    ``places``.
    """

    def __init__(self, hidden: int, places: int, across: int, numbers: Sequence[int]) -> None:
        super().__init__()
        self.looks = len(numbers)
        self.ask = nn.Linear(hidden, self.looks * _WIDTH)
        self.where = nn.Parameter(0.02 * torch.randn(places * across**2, _WIDTH))
        self.colour = nn.Linear(6, _WIDTH, bias=False)
        self.read = nn.ParameterList(torch.zeros(3, n) for n in numbers)

    def forward(self, hidden: Tensor, before: Tensor, after: Tensor) -> list[Tensor]:
        """``hidden`` [batch, hidden], ``before`` and ``after`` [batch, views, places, 3 * across²]: [batch, numbers] of
        each look, the mean over views."""
        old, new = _pixels(before), _pixels(after)
        keys = self.where + self.colour(torch.cat([new, new - old], -1))  # [batch, views, pixels, width]
        asked = self.ask(hidden).unflatten(-1, (self.looks, -1))
        shares = torch.einsum("blw,bvpw->bvlp", asked, keys).softmax(-1)
        found = torch.einsum("bvlp,bvpc->blc", shares, new) / new.shape[1]
        return [found[:, i] @ read for i, read in enumerate(self.read)]


def _pixels(tokens: Tensor) -> Tensor:
    """[batch, views, places * across², 3] of what lies beside tokens."""
    return tokens.unflatten(-1, (3, -1)).mT.flatten(2, 3)


_ON_PIXELS: Final = 1 / 6
"""Share of the noise that pixels get: a colour is to be told exactly."""
Sight = tuple[ImageFeatures, ImageFeatures]
"""What is seen of a pair, and of its first picture beside itself."""


class Wording(nn.Module):
    """A residual network over what is seen of a pair, ``feature_width`` numbers at each of ``places`` (more tokens are
    averaged to so many), that says which prompts of a ``vocabulary`` ask for the change; several pairs of the same edit
    are averaged where that is chosen. While it learns what is usual of each number, ``noise`` times that is added.

    ``pixels`` is the ``colours`` of a ``VisionEncoder``: its tokens of A and of A' end with so many pixels across of
    the picture. Mixtures then point at a colour there (``Pointing``), and of the noise these numbers get a sixth.

    It decides: a little of many prompts is nothing that a base was told before. So it learns from what is said
    (``Vocabulary.loss``), not through the base. ``learn`` tells it the base's texts, of which it keeps each at
    ``text_rank`` (else ``rank``, the LoRA's), all in the ``text_basis`` directions in which they differ most (those of
    the avatars' need 32 of 192).
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
        text_rank: int | None = None,
        text_basis: int = 48,
        pixels: int = 0,
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
        self.pixels = pixels
        edges = [len(group) - 1 for group in self.vocabulary.mixtures.values()]
        self.pointing = Pointing(hidden, places, pixels, edges) if pixels and edges else None
        prompts = len(self.vocabulary.prompts) + len(self.vocabulary.ways_back)
        basis, text_rank = min(text_basis, width), text_rank or rank
        self.register_buffer("text_a", torch.zeros(prompts, tokens, text_rank))
        self.register_buffer("text_b", torch.zeros(prompts, text_rank, basis))

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What maps what is seen to what is said, without the last layer, vectors and where things are seen."""
        parts = [self.place, self.whole, self.blocks, *([self.pointing.ask] if self.pointing else [])]
        return [p for part in parts for p in part.parameters() if p.ndim == 2]

    @torch.no_grad()
    def learn(self, texts: Tensor) -> Tensor:
        """``texts`` [prompts, tokens, width]: e(prompt) - e(∅) of the vocabulary's prompts and its ways back. Returns
        the basis [directions, width] that they are kept in, orthonormal."""
        moments = torch.einsum("ptw,ptv->wv", texts.double(), texts.double())
        basis = torch.linalg.eigh(moments).eigenvectors.mT.flip(0)[: self.text_b.shape[-1]].to(texts)
        a, b = low_rank(texts @ basis.mT, self.text_a.shape[-1])
        self.text_a.copy_(a)
        self.text_b.copy_(b)
        return basis

    @torch.no_grad()
    def forward(self, change: Sight, turned: Sight) -> tuple[Tensor, Tensor]:
        """``change`` holds (A, A') and (A, A), ``turned`` (A', A) and (A', A'), each joined: a [batch, tokens, rank]
        and b [batch, rank, basis]."""
        weights = self.weights(*change)
        if self.vocabulary.back:
            weights = torch.cat([weights, -self.weights(*turned)], -1)
        with torch.autocast(self.text_a.device.type, enabled=False):
            return low_rank(torch.einsum("np,ptr,prk->ntk", weights, self.text_a, self.text_b), self.rank)

    def weights(self, pair: ImageFeatures, nothing: ImageFeatures) -> Tensor:
        """How much of each prompt asks for the change, [batch, prompts]; ``pair`` holds (A, A'), ``nothing`` (A, A)."""
        with torch.autocast(self.text_a.device.type, enabled=False):
            return self.vocabulary.weights(self.said(pair)) - self.vocabulary.weights(self.said(nothing))

    def said(self, pair: ImageFeatures) -> Tensor:
        """[batch, numbers], as ``Vocabulary`` reads them. Raises ``BadRequest`` if it points at pixels, but there are
        other ``places``."""
        tokens = pair.tokens.float()
        if tokens.shape[-2] != self.places:
            if self.pointing is not None:
                raise BadRequest(f"words point at pixels of {self.places} places, the encoder shows {tokens.shape[-2]}")
            batch, views = tokens.shape[:2]
            tokens = F.adaptive_avg_pool1d(tokens.flatten(0, 1).mT, self.places).mT.unflatten(0, (batch, views))
        usual = self.usual(tokens.flatten(0, 2)).view_as(tokens)  # colours and features are of different sizes
        if self.usual.training:
            usual = self._spoilt(usual)
        seen = self.whole(self.place(usual).flatten(-2))
        for block in self.blocks:
            seen = seen + block(seen)
        seen = self.norm(seen.mean(1))
        said = self.what(seen)
        if self.pointing is None:
            return said
        before, after = self._beside(tokens)
        points = self.pointing(seen, before, after)
        choices = sum(self.vocabulary.sizes) - sum(1 + p.shape[-1] for p in points)
        pointed = [F.pad(p, (1, 0)) for p in points]  # whether there is one is not pointed at
        return said + F.pad(torch.cat(pointed, -1), (choices, 0))

    def _spoilt(self, usual: Tensor) -> Tensor:
        """With noise, of which pixels get less."""
        noise = self.noise * torch.randn_like(usual)
        for pixels in self._beside(noise):
            pixels *= _ON_PIXELS
        return usual + noise

    def _beside(self, tokens: Tensor) -> list[Tensor]:
        """The pixels of A and of A', views of their tokens."""
        return [side[..., side.shape[-1] - 3 * self.pixels**2 :] for side in tokens.chunk(2, -1)]
