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
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))  # face, image
        if mode != "image":
            self.face_proj = nn.Sequential(
                nn.LayerNorm(face_feature_width),
                nn.Linear(face_feature_width, num_tokens * width),
                nn.Unflatten(-1, (num_tokens, width)),
            )
        if mode != "face":
            self.image_proj = nn.Sequential(
                nn.LayerNorm(image_feature_width), nn.Linear(image_feature_width, width)
            )
            self.queries = nn.Parameter(torch.randn(num_tokens, width) * 0.02)
            self.cross_attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        if mode == "gate":
            self.gate = nn.Linear(2 * width, width)
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
        batch_and_views = image_features.tokens.shape[:2]
        if self.mode == "image":
            mixed_tokens = self._encode_image(image_features)  # [batch * views, num_tokens, width]
            gate = torch.zeros_like(mixed_tokens)
        elif self.mode == "face":
            mixed_tokens = self._encode_face(face_features)  # [batch * views, num_tokens, width]
            gate = torch.ones_like(mixed_tokens)
        else:
            face_tokens = self._encode_face(face_features)  # [batch * views, num_tokens, width]
            image_tokens = self._encode_image(image_features)  # of the same shape
            gate = torch.full_like(face_tokens, 0.5)
            if self.mode == "gate":
                gate = torch.sigmoid(self.gate(torch.cat([face_tokens, image_tokens], -1)))
            mixed_tokens = gate * face_tokens + (1 - gate) * image_tokens
        mixed_features = ImageFeatures(mixed_tokens.unflatten(0, batch_and_views))
        return mixed_features, gate.unflatten(0, batch_and_views)

    def _encode_face(self, face_features: ImageFeatures) -> Tensor:
        """E_face, [batch * views, num_tokens, width]."""
        face_vectors = face_features.tokens.flatten(0, 1)[:, 0]  # [batch * views, face_width]
        face_tokens: Tensor = self.norms[0](self.face_proj(face_vectors))
        return face_tokens

    def _encode_image(self, image_features: ImageFeatures) -> Tensor:
        """E_image, [batch * views, num_tokens, width]."""
        keys = self.image_proj(image_features.tokens.flatten(0, 1))  # [batch * views, n, width]
        queries = self.queries.expand(len(keys), -1, -1)  # [batch * views, num_tokens, width]
        attn_output, _ = self.cross_attn(queries, keys, keys, need_weights=False)
        image_tokens: Tensor = self.norms[1](attn_output)
        return image_tokens
