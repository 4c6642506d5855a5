"""``ColorPointer``: a colour is not remembered but pointed at: where in the picture it is seen, and what is seen there."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures
from hyperlora.lora.text_substitution import compute_low_rank_factors
from hyperlora.models.instruction_vocabulary import InstructionVocabulary

_HEAD_DIM: Final = 16
"""Of the attention; a place is told from others by where it is, what colour it has and how that changed."""


class ColorPointer(nn.Module):
    """One look at a small picture for each of several things to be said of it: attention over its pixels, and what is
    read from the colour found there, ``output_sizes[i]`` numbers of look i, linear in it; 0 at initialisation.

    The small picture is what a ``TimmEncoder`` with ``colours`` puts beside its tokens: ``patch_pixels``² pixels at each of
    ``num_patches``.
    """

    def __init__(
        self, hidden_size: int, num_patches: int, patch_pixels: int, output_sizes: Sequence[int]
    ) -> None:
        super().__init__()
        self.num_queries = len(output_sizes)
        self.to_q = nn.Linear(hidden_size, self.num_queries * _HEAD_DIM)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(num_patches * patch_pixels**2, _HEAD_DIM))
        self.color_proj = nn.Linear(6, _HEAD_DIM, bias=False)
        self.to_out = nn.ParameterList(torch.zeros(3, output_size) for output_size in output_sizes)

    def forward(self, hidden_states: Tensor, before: Tensor, after: Tensor) -> list[Tensor]:
        """``list_hidden_attributes`` [batch, hidden], ``before`` and ``after`` [batch, views, places, 3 * across²]: [batch, numbers] of
        each look, the mean over views."""
        before_pixels, after_pixels = _flatten_patch_pixels(before), _flatten_patch_pixels(after)
        keys = self.pos_embed + self.color_proj(
            torch.cat([after_pixels, after_pixels - before_pixels], -1)
        )  # [batch, views, pixels, width]
        queries = self.to_q(hidden_states).unflatten(-1, (self.num_queries, -1))
        attn_weights = torch.einsum("blw,bvpw->bvlp", queries, keys).softmax(-1)
        attended_colors = (
            torch.einsum("bvlp,bvpc->blc", attn_weights, after_pixels) / after_pixels.shape[1]
        )
        return [attended_colors[:, i] @ out_weight for i, out_weight in enumerate(self.to_out)]


def _flatten_patch_pixels(tokens: Tensor) -> Tensor:
    """[batch, views, places * across², 3] of what lies beside tokens."""
    return tokens.unflatten(-1, (3, -1)).mT.flatten(2, 3)


_PIXEL_NOISE_SCALE: Final = 1 / 6
"""Share of the noise that pixels get: a colour is to be told exactly."""
PairFeatures = tuple[ImageFeatures, ImageFeatures]
"""What is seen of a pair, and of its first picture beside itself."""


class InstructionHead(nn.Module):
    """A residual network over what is seen of a pair, ``feature_width`` numbers at each of ``num_patches`` (more tokens are
    averaged to so many), that says which prompts of a ``build_vocabulary`` ask for the change; several pairs of the same edit
    are averaged where that is chosen. While it learns what is usual of each number, ``noise_std`` times that is added.

    ``patch_pixels`` is the ``colours`` of a ``TimmEncoder``: its tokens of A and of A' end with so many pixels across of
    the picture. Mixtures then point at a colour there (``ColorPointer``), and of the noise these numbers get a sixth.

    It decides: a little of many prompts is nothing that a base was told before. So it learns from what is said
    (``InstructionVocabulary.loss``), not through the base. ``set_text_embeddings`` tells it the base's texts, of which it keeps each at
    ``text_rank`` (else ``rank``, the LoRA's), all in the ``text_basis_size`` directions in which they differ most (those of
    the avatars' need 32 of 192).
    """

    text_a: Tensor
    text_b: Tensor

    def __init__(
        self,
        feature_width: int,
        num_text_tokens: int,
        cross_attention_dim: int,
        rank: int,
        vocabulary: Mapping[str, Any],
        num_patches: int = 4,
        hidden_size: int = 288,
        depth: int = 2,
        noise_std: float = 0.0,
        text_rank: int | None = None,
        text_basis_size: int = 48,
        patch_pixels: int = 0,
    ) -> None:
        super().__init__()
        self.vocabulary = InstructionVocabulary.from_config(vocabulary)
        self.noise_std, self.rank, self.num_patches = noise_std, rank, num_patches
        patch_hidden_size = hidden_size // 3
        self.input_norm = nn.BatchNorm1d(feature_width, affine=False)
        self.patch_proj = nn.Sequential(nn.Linear(feature_width, patch_hidden_size), nn.GELU())
        self.global_proj = nn.Linear(num_patches * patch_hidden_size, hidden_size)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden_size),
                nn.Linear(hidden_size, hidden_size // 2),
                nn.GELU(),
                nn.Linear(hidden_size // 2, hidden_size),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.classifier = nn.Linear(hidden_size, sum(self.vocabulary.logit_sizes))
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.patch_pixels = patch_pixels
        point_sizes = [len(group) - 1 for group in self.vocabulary.color_axes.values()]
        self.color_pointer = (
            ColorPointer(hidden_size, num_patches, patch_pixels, point_sizes)
            if patch_pixels and point_sizes
            else None
        )
        num_prompts = len(self.vocabulary.prompts) + len(self.vocabulary.undo_prompts)
        basis_size, text_rank = min(text_basis_size, cross_attention_dim), text_rank or rank
        self.register_buffer("text_a", torch.zeros(num_prompts, num_text_tokens, text_rank))
        self.register_buffer("text_b", torch.zeros(num_prompts, text_rank, basis_size))

    def get_hidden_matrices(self) -> list[nn.Parameter]:
        """What maps what is seen to what is said, without the last layer, vectors and where things are seen."""
        modules = [
            self.patch_proj,
            self.global_proj,
            self.blocks,
            *([self.color_pointer.to_q] if self.color_pointer else []),
        ]
        return [
            parameter
            for module in modules
            for parameter in module.parameters()
            if parameter.ndim == 2
        ]

    @torch.no_grad()
    def set_text_embeddings(self, text_offsets: Tensor) -> Tensor:
        """``text_offsets`` [prompts, tokens, width]: e(prompt) - e(∅) of the vocabulary's prompts and its ways back. Returns
        the basis [directions, width] that they are kept in, orthonormal."""
        second_moments = torch.einsum("ptw,ptv->wv", text_offsets.double(), text_offsets.double())
        basis = (
            torch.linalg.eigh(second_moments)
            .eigenvectors.mT.flip(0)[: self.text_b.shape[-1]]
            .to(text_offsets)
        )
        a, b = compute_low_rank_factors(text_offsets @ basis.mT, self.text_a.shape[-1])
        self.text_a.copy_(a)
        self.text_b.copy_(b)
        return basis

    @torch.no_grad()
    def forward(
        self, features: PairFeatures, reversed_features: PairFeatures
    ) -> tuple[Tensor, Tensor]:
        """``features`` holds (A, A') and (A, A), ``reversed_features`` (A', A) and (A', A'), each joined: a [batch, tokens, rank]
        and b [batch, rank, basis]."""
        prompt_weights = self.predict_prompt_weights(*features)
        if self.vocabulary.undo_template:
            prompt_weights = torch.cat(
                [prompt_weights, -self.predict_prompt_weights(*reversed_features)], -1
            )
        with torch.autocast(self.text_a.device.type, enabled=False):
            return compute_low_rank_factors(
                torch.einsum("np,ptr,prk->ntk", prompt_weights, self.text_a, self.text_b), self.rank
            )

    def predict_prompt_weights(
        self, pair_features: ImageFeatures, unchanged_features: ImageFeatures
    ) -> Tensor:
        """How much of each prompt asks for the change, [batch, prompts]; ``pair_features`` holds (A, A'), ``unchanged_features`` (A, A)."""
        with torch.autocast(self.text_a.device.type, enabled=False):
            return self.vocabulary.compute_prompt_weights(
                self.forward_logits(pair_features)
            ) - self.vocabulary.compute_prompt_weights(self.forward_logits(unchanged_features))

    def forward_logits(self, pair_features: ImageFeatures) -> Tensor:
        """[batch, numbers], as ``InstructionVocabulary`` reads them. Raises ``InvalidArgumentError`` if it points at pixels, but there are
        other ``num_patches``."""
        tokens = pair_features.tokens.float()
        if tokens.shape[-2] != self.num_patches:
            if self.color_pointer is not None:
                raise InvalidArgumentError(
                    f"words point at pixels of {self.num_patches} places, the encoder shows {tokens.shape[-2]}"
                )
            batch, views = tokens.shape[:2]
            tokens = F.adaptive_avg_pool1d(tokens.flatten(0, 1).mT, self.num_patches).mT.unflatten(
                0, (batch, views)
            )
        normalized = self.input_norm(tokens.flatten(0, 2)).view_as(
            tokens
        )  # colours and features are of different sizes
        if self.input_norm.training:
            normalized = self._add_input_noise(normalized)
        hidden_states = self.global_proj(self.patch_proj(normalized).flatten(-2))
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states)
        hidden_states = self.norm(hidden_states.mean(1))
        logits = self.classifier(hidden_states)
        if self.color_pointer is None:
            return logits
        before, after = self._get_patch_pixels(tokens)
        points = self.color_pointer(hidden_states, before, after)
        num_category_logits = sum(self.vocabulary.logit_sizes) - sum(
            1 + point.shape[-1] for point in points
        )
        point_logits = [
            F.pad(point, (1, 0)) for point in points
        ]  # whether there is one is not pointed at
        return logits + F.pad(torch.cat(point_logits, -1), (num_category_logits, 0))

    def _add_input_noise(self, normalized: Tensor) -> Tensor:
        """With noise, of which pixels get less."""
        noise = self.noise_std * torch.randn_like(normalized)
        for pixels in self._get_patch_pixels(noise):
            pixels *= _PIXEL_NOISE_SCALE
        return normalized + noise

    def _get_patch_pixels(self, tokens: Tensor) -> list[Tensor]:
        """The pixels of A and of A', views of their tokens."""
        return [
            side_tokens[..., side_tokens.shape[-1] - 3 * self.patch_pixels**2 :]
            for side_tokens in tokens.chunk(2, -1)
        ]
