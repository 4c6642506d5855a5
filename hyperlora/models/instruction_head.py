"""``InstructionHead``: predicts the edit instruction that turns an image A into A'."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.compute import disable_autocast
from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures
from hyperlora.lora.text_substitution import compute_low_rank_factors
from hyperlora.models.color_pointer import ColorPointer
from hyperlora.models.instruction_vocabulary import InstructionVocabulary

PairFeatures = tuple[ImageFeatures, ImageFeatures]
"""Fused features of a pair (A, A'), and of its first image with itself, (A, A)."""
_PIXEL_NOISE_SCALE: Final = 1 / 6
"""Share of the input noise that pixels get: colors must be read exactly."""


@dataclass(frozen=True)
class InstructionHeadConfig:
    """Configuration of an ``InstructionHead`` and of the ``TextSubstitution`` that it feeds.

    Attributes:
        num_text_tokens: Tokens per prompt of the base's text encoder.
        cross_attention_dim: Width of these tokens.
        vocabulary: The instructions to predict.
        other_rank: Rank of the LoRA of all target modules that do not read text; None for the
            layout's.
        hidden_size: Width of the head.
        depth: Number of residual blocks.
        num_patches: Patches per image. More are pooled to so many, unless ``patch_pixels`` is set.
        noise_std: Standard deviation of the noise on the normalized input while it trains.
        text_rank: Rank of the stored text embeddings; None for the layout's.
        text_basis_size: Dimensions of the space in which text embeddings are stored. Those of the
            bundled avatars need 32 of 192.
        patch_pixels: ``patch_pixels`` of the ``TimmEncoder``: each token ends with so many pixels
            along each axis. Colors are then read from the pixels (``ColorPointer``). 0 for none.
    """

    num_text_tokens: int
    cross_attention_dim: int
    vocabulary: InstructionVocabulary
    other_rank: int | None = None
    hidden_size: int = 288
    depth: int = 2
    num_patches: int = 4
    noise_std: float = 0.0
    text_rank: int | None = None
    text_basis_size: int = 48
    patch_pixels: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from a part of ``config.json``: the fields, ``vocabulary`` as a mapping."""
        vocabulary = InstructionVocabulary.from_config(config["vocabulary"])
        return cls(**{**config, "vocabulary": vocabulary})

    def to_config(self) -> dict[str, object]:
        """Return what ``from_config`` takes, as plain JSON types."""
        return asdict(self) | {"vocabulary": self.vocabulary.to_config()}


class InstructionHead(nn.Module):
    """Residual network from the fused features of a pair to the weights of a vocabulary's prompts.

    It classifies: each category has one value or none. A regressed embedding would be a mixture of
    many prompts, and the base has never seen such mixtures. It is trained on instructions alone
    (``InstructionVocabulary.compute_loss``), without running the base. Several pairs that show the
    same edit (views) are averaged.

    Letters of shapes: B edits (batch), V views (pairs of one edit), P ``num_patches``, G
    ``feature_width``, d ``hidden_size``, J logits, U prompts of the vocabulary, S stored prompts
    (U, with undo prompts 2 U), T ``num_text_tokens``, E ``cross_attention_dim``, k basis size, q
    text rank, r ``rank``.

    Args:
        feature_width: Width of the fused tokens.
        rank: Of the LoRA that the instruction becomes.
        config: All other options.
    """

    text_a: Tensor
    text_b: Tensor

    def __init__(self, feature_width: int, rank: int, config: InstructionHeadConfig) -> None:
        super().__init__()
        self.config, self.rank, self.vocabulary = config, rank, config.vocabulary
        hidden_size, patch_hidden_size = config.hidden_size, config.hidden_size // 3
        # Colors and features differ in scale. patch_proj would absorb a learned affine map.
        self.input_norm = nn.BatchNorm1d(feature_width, affine=False)
        # d / 3 per patch, since the P patches are concatenated: [P, G] → [P · d / 3] → [d]
        self.patch_proj = nn.Sequential(nn.Linear(feature_width, patch_hidden_size), nn.GELU())
        self.global_proj = nn.Linear(config.num_patches * patch_hidden_size, hidden_size)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden_size),
                nn.Linear(hidden_size, hidden_size // 2),  # d / 2 wide: d² weights; 4 d has 8 d²
                nn.GELU(),
                nn.Linear(hidden_size // 2, hidden_size),
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.classifier = nn.Linear(hidden_size, sum(self.vocabulary.logit_sizes))
        # equal logits mean no value of any category, and no color: every weight is 0 at first
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        # axes of each color space: its prompts without the origin
        point_sizes = [len(group) - 1 for group in self.vocabulary.color_axes.values()]
        self.color_pointer = (
            ColorPointer(hidden_size, config.num_patches, config.patch_pixels, point_sizes)
            if config.patch_pixels and point_sizes
            else None
        )
        # e(prompt) - e(∅) of every prompt ≈ text_a text_b basis  [S, T, E]
        num_stored_prompts = len(self.vocabulary.prompts) + len(self.vocabulary.undo_prompts)  # S
        text_rank = config.text_rank or rank
        basis_size = min(config.text_basis_size, config.cross_attention_dim)
        # buffers: they come from the base's text encoder, and no gradient changes them
        text_a_shape = (num_stored_prompts, config.num_text_tokens, text_rank)  # [S, T, q]
        self.register_buffer("text_a", torch.zeros(text_a_shape))
        self.register_buffer("text_b", torch.zeros(num_stored_prompts, text_rank, basis_size))

    def list_hidden_matrices(self) -> list[nn.Parameter]:
        """List the matrices for ``Muon``: all without vectors, output layers and embeddings."""
        modules: list[nn.Module] = [self.patch_proj, self.global_proj, self.blocks]
        if self.color_pointer is not None:
            modules.append(self.color_pointer.to_q)
        parameters = (parameter for module in modules for parameter in module.parameters())
        return [parameter for parameter in parameters if parameter.ndim == 2]

    @torch.no_grad()
    def set_text_embeddings(self, text_offsets: Tensor) -> Tensor:
        """Store the base's text embeddings, in low rank and in a common basis.

        Args:
            text_offsets: e(prompt) - e(∅) of ``vocabulary.prompts``, then of its ``undo_prompts``,
                [num_stored_prompts, num_text_tokens, cross_attention_dim].

        Returns:
            The basis, orthonormal rows [basis_size, cross_attention_dim].
        """
        # Σ e eᵀ over all prompts and tokens [E, E]. Not centered: an offset of 0 must stay 0.
        offsets = text_offsets.cpu().double()  # MPS has no float64
        second_moments = torch.einsum("ste,stf->ef", offsets, offsets)
        # eigh: one vector per column, in rising order. Here one per row, largest first.
        eigenvectors = torch.linalg.eigh(second_moments).eigenvectors.mT.flip(0)  # [E, E]
        basis = eigenvectors[: self.text_b.shape[-1]].to(text_offsets)  # [k, E]
        # the coordinates of each prompt in the basis, [S, T, k] ≈ a b
        a, b = compute_low_rank_factors(text_offsets @ basis.mT, self.text_a.shape[-1])
        self.text_a.copy_(a)  # [S, T, q]
        self.text_b.copy_(b)  # [S, q, k]
        return basis

    @torch.no_grad()
    def forward(
        self, features: PairFeatures, reversed_features: PairFeatures
    ) -> tuple[Tensor, Tensor]:
        """Predict the change of the text embedding, in the factors of ``TextSubstitution``.

        The predicted instruction is added to the empty prompt. With an ``undo_template``, the
        instruction that restores the original image is subtracted, so that the negative of the
        LoRA undoes the edit.

        Args:
            features: Fused features of (A, A') and (A, A).
            reversed_features: Fused features of (A', A) and (A', A').

        Returns:
            a [batch, num_text_tokens, rank] and b [batch, rank, basis_size] with
            a b basis ≈ e(instruction) - e(∅).
        """
        # No gradient: the argmax of compute_prompt_weights has none. Training uses forward_logits.
        prompt_weights = self.predict_prompt_weights(*features)  # w(A, A') [B, U]
        if self.vocabulary.undo_template:
            undo_weights = -self.predict_prompt_weights(*reversed_features)  # -w(A', A) [B, U]
            prompt_weights = torch.cat([prompt_weights, undo_weights], -1)  # [B, S], S = 2 U
        with disable_autocast(self.text_a.device):  # the SVD has no bfloat16
            # e(instruction) - e(∅) = Σ_s w_s (text_a_s text_b_s), in coordinates of the basis
            text_offset = torch.einsum(
                "bs,stq,sqk->btk", prompt_weights, self.text_a, self.text_b
            )  # [B, T, k]
            return compute_low_rank_factors(text_offset, self.rank)  # a [B, T, r], b [B, r, k]

    def predict_prompt_weights(
        self, pair_features: ImageFeatures, unchanged_features: ImageFeatures
    ) -> Tensor:
        """Predict the weight of each prompt: w(A, A') - w(A, A), so that no edit gives 0.

        Args:
            pair_features: Fused features of (A, A').
            unchanged_features: Fused features of (A, A).

        Returns:
            Weights of ``vocabulary.prompts``, [batch, num_prompts].
        """
        # float32: bfloat16 would round the coordinates of colors to 8 bits
        with disable_autocast(self.text_a.device):
            pair_logits = self.forward_logits(pair_features)  # [B, J]
            unchanged_logits = self.forward_logits(unchanged_features)  # [B, J]
            pair_weights = self.vocabulary.compute_prompt_weights(pair_logits)  # [B, U]
            return pair_weights - self.vocabulary.compute_prompt_weights(unchanged_logits)

    def forward_logits(self, pair_features: ImageFeatures) -> Tensor:
        """Predict the logits of the vocabulary.

        Args:
            pair_features: Fused tokens [batch, views, num_patches, feature_width]. Without a
                color pointer, other numbers of patches are pooled.

        Returns:
            [batch, sum(vocabulary.logit_sizes)].

        Raises:
            InvalidArgumentError: If there is a color pointer and another number of patches.
        """
        tokens = self._pool_patches(pair_features.tokens.float())  # [B, V, P, G]
        # each patch of each view is one sample of the statistics: [B·V·P, G]
        normalized = self.input_norm(tokens.flatten(0, 2)).view_as(tokens)  # [B, V, P, G]
        # input_norm is in evaluation while the network trains through the base: then no noise
        if self.input_norm.training:
            normalized = self._add_input_noise(normalized)
        patch_states = self.patch_proj(normalized)  # [B, V, P, d / 3]
        # concatenated, not averaged, since the place of a change tells what has changed
        hidden_states = self.global_proj(patch_states.flatten(-2))  # [B, V, d]
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states)  # [B, V, d]
        hidden_states = self.norm(hidden_states.mean(1))  # [B, d]
        logits = self.classifier(hidden_states)  # [B, J]
        if self.color_pointer is None:
            return logits
        # pixels before input_norm and its noise: the colors that the pointer copies are exact
        before, after = self._split_pixels(tokens)  # each [B, V, P, 3·p²], p = patch_pixels
        points = self.color_pointer(hidden_states, before, after)  # each [B, axes of the space]
        return logits + self._pad_points(points)  # [B, J]

    def _pool_patches(self, tokens: Tensor) -> Tensor:
        """[batch, views, patches, feature_width] to [batch, views, num_patches, feature_width]."""
        batch, views, patches, _ = tokens.shape  # [B, V, N, G]
        num_patches = self.config.num_patches
        if patches == num_patches:
            return tokens
        if self.color_pointer is not None:
            raise InvalidArgumentError(
                f"the instruction head expects {num_patches} patches, the encoder gives {patches}"
            )
        # along the sequence, row by row of the image: a pooled patch is a band, not a square
        pooled = F.adaptive_avg_pool1d(tokens.flatten(0, 1).mT, num_patches).mT  # [B·V, P, G]
        return pooled.unflatten(0, (batch, views))  # [B, V, P, G]

    def _pad_points(self, points: list[Tensor]) -> Tensor:
        """Colors as logits [batch, sum(logit_sizes)]; 0 for categories and the colors' presence."""
        num_categories = len(self.vocabulary.categories)
        num_category_logits = sum(self.vocabulary.logit_sizes[:num_categories])
        # one 0 in front of each color, where its presence logit is: each [B, 1 + axes]
        point_logits = [F.pad(point, (1, 0)) for point in points]
        return F.pad(torch.cat(point_logits, -1), (num_category_logits, 0))  # [B, J]

    def _add_input_noise(self, normalized: Tensor) -> Tensor:
        """Add noise, less of it to the pixels."""
        noise = self.config.noise_std * torch.randn_like(normalized)  # [B, V, P, G]
        # the pixels are views of the noise, so this scales the noise itself
        for pixels in self._split_pixels(noise):
            pixels *= _PIXEL_NOISE_SCALE
        return normalized + noise

    def _split_pixels(self, tokens: Tensor) -> list[Tensor]:
        """The pixels of A and of A', views of their tokens [..., 3 * patch_pixels²]."""
        num_values = 3 * self.config.patch_pixels**2
        # Fusion "concat" puts A into the first half of G and A' into the second; pixels come last.
        # Without pixels the slices are empty; [-num_values:] would then be all of the token.
        return [
            image_tokens[..., image_tokens.shape[-1] - num_values :]
            for image_tokens in tokens.chunk(2, -1)
        ]
