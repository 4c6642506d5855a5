"""``MixedImageFeatures``: features of a face network and an image encoder as one condition.

It is the MIF of DiffLoRA (2408.06740):

    z = g ⊙ E_face(x) + (1 - g) ⊙ E_image(x),   g = σ(W [E_face(x), E_image(x)] + b)

The gate g has one value per token and channel.
"""

from typing import Final, TypedDict

import torch
from torch import Tensor, nn

from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures

GATE_MODES: Final = ("gate", "average", "face", "image")
"""A learned gate; for comparison g = 1/2, g = 1 and g = 0."""


class MixedImageFeaturesConfig(TypedDict):
    """Arguments of ``MixedImageFeatures``, as in ``config.json``."""

    face_feature_width: int
    image_feature_width: int
    width: int
    num_tokens: int
    num_heads: int
    mode: str


class MixedImageFeatures(nn.Module):
    """Gated mix of face features and image tokens.

    Learned queries attend to the image tokens. A linear layer unfolds the face vector to as many
    tokens. A branch that the mode does not use has no weights.

    Letters of shapes: B subjects (batch), V views (photos of one subject), N image tokens per
    photo, F_face and F_image the feature widths, Q ``num_tokens``, d ``width``.

    Args:
        face_feature_width: Width of the face vector.
        image_feature_width: Width of the image tokens.
        width: Of the mixed tokens.
        num_tokens: Mixed tokens per photo.
        num_heads: Heads of the attention to the image tokens.
        mode: One of ``GATE_MODES``.

    Raises:
        InvalidArgumentError: If the mode is unknown.
    """

    def __init__(
        self,
        face_feature_width: int,
        image_feature_width: int,
        width: int = 128,
        num_tokens: int = 16,
        num_heads: int = 4,
        mode: str = "gate",
    ) -> None:
        super().__init__()
        if mode not in GATE_MODES:
            raise InvalidArgumentError(f"unknown mixture {mode!r}; known: {', '.join(GATE_MODES)}")
        self.mode, self.width = mode, width
        self.config: MixedImageFeaturesConfig = {
            "face_feature_width": face_feature_width,
            "image_feature_width": image_feature_width,
            "width": width,
            "num_tokens": num_tokens,
            "num_heads": num_heads,
            "mode": mode,
        }
        # One for face, one for image: with unequal scales, the larger branch would win at g = 1/2.
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        if mode != "image":
            self.face_proj = nn.Sequential(
                nn.LayerNorm(face_feature_width),
                nn.Linear(face_feature_width, num_tokens * width),  # one vector to Q tokens
                nn.Unflatten(-1, (num_tokens, width)),  # [B·V, Q, d]
            )
        if mode != "face":
            self.image_proj = nn.Sequential(
                nn.LayerNorm(image_feature_width), nn.Linear(image_feature_width, width)
            )
            # Q queries turn N image tokens into Q tokens, which face tokens can be added to
            self.queries = nn.Parameter(torch.randn(num_tokens, width) * 0.02)  # [Q, d]
            self.cross_attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        if mode == "gate":
            self.gate = nn.Linear(2 * width, width)  # W, b of g = σ(W [E_face, E_image] + b)
            nn.init.zeros_(self.gate.weight)  # g = 1/2 at initialization
            nn.init.zeros_(self.gate.bias)

    def forward(self, face_features: ImageFeatures, image_features: ImageFeatures) -> ImageFeatures:
        """Mix the features of each photo.

        Args:
            face_features: Tokens [batch, views, 1, face_feature_width].
            image_features: Tokens [batch, views, n, image_feature_width].

        Returns:
            Tokens [batch, views, num_tokens, width].
        """
        return self.forward_with_gate(face_features, image_features)[0]

    def forward_with_gate(
        self, face_features: ImageFeatures, image_features: ImageFeatures
    ) -> tuple[ImageFeatures, Tensor]:
        """Mix the features of each photo, and return the gate as well.

        Args:
            face_features: Tokens [batch, views, 1, face_feature_width].
            image_features: Tokens [batch, views, n, image_feature_width].

        Returns:
            Mixed tokens and gate, both [batch, views, num_tokens, width]. The gate is 1 where
            only the face counts.
        """
        # B, V: each photo is mixed by itself, so both axes are one inside
        batch_and_views = image_features.tokens.shape[:2]
        if self.mode == "image":
            mixed_tokens = self._encode_image(image_features)  # [B·V, Q, d]
            gate = torch.zeros_like(mixed_tokens)
        elif self.mode == "face":
            mixed_tokens = self._encode_face(face_features)  # [B·V, Q, d]
            gate = torch.ones_like(mixed_tokens)
        else:
            face_tokens = self._encode_face(face_features)  # [B·V, Q, d]
            image_tokens = self._encode_image(image_features)  # [B·V, Q, d]
            gate = torch.full_like(face_tokens, 0.5)  # g [B·V, Q, d]
            if self.mode == "gate":
                gate = torch.sigmoid(self.gate(torch.cat([face_tokens, image_tokens], -1)))
            # z = g ⊙ E_face + (1 - g) ⊙ E_image  [B·V, Q, d]
            mixed_tokens = gate * face_tokens + (1 - gate) * image_tokens
        mixed_features = ImageFeatures(mixed_tokens.unflatten(0, batch_and_views))  # [B, V, Q, d]
        return mixed_features, gate.unflatten(0, batch_and_views)  # g [B, V, Q, d]

    def _encode_face(self, face_features: ImageFeatures) -> Tensor:
        """E_face, [batch * views, num_tokens, width]."""
        face_vectors = face_features.tokens.flatten(0, 1)[:, 0]  # the only token, [B·V, F_face]
        face_tokens: Tensor = self.norms[0](self.face_proj(face_vectors))  # [B·V, Q, d]
        return face_tokens

    def _encode_image(self, image_features: ImageFeatures) -> Tensor:
        """E_image, [batch * views, num_tokens, width]."""
        keys = self.image_proj(image_features.tokens.flatten(0, 1))  # also the values, [B·V, N, d]
        queries = self.queries.expand(len(keys), -1, -1)  # [B·V, Q, d]
        attn_output, _ = self.cross_attn(queries, keys, keys, need_weights=False)  # [B·V, Q, d]
        image_tokens: Tensor = self.norms[1](attn_output)  # [B·V, Q, d]
        return image_tokens
