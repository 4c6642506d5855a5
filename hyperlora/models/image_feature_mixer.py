"""``MixedImageFeatures``: what a face and an image network say about a photo, as one condition (MIF; 2408.06740).

z = g ⊙ E_face(x) + (1 - g) ⊙ E_image(x)        g = σ(gate(E_face, E_image)), per token and channel
"""

from typing import Any, Final

import torch
from torch import Tensor, nn

from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures

GATE_MODES: Final = ("gate", "average", "face", "image")


class MixedImageFeatures(nn.Module):
    """Face features [batch, views, 1, face_width] and image tokens [batch, views, n, image_width] to tokens
    [batch, views, tokens, width].

    Learned queries look at the image's tokens; the face's vector is unfolded to as many tokens. ``mode`` is ``gate``,
    or for comparison ``average`` (g = 1/2), ``face`` (1) or ``image`` (0); what is not heard has no weights.
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
        self.config: dict[str, Any] = {
            "face_width": face_feature_width,
            "image_width": image_feature_width,
            "width": width,
            "tokens": num_tokens,
            "heads": num_heads,
            "mode": mode,
        }
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
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
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def forward(self, face_features: ImageFeatures, image_features: ImageFeatures) -> ImageFeatures:
        return self.forward_with_gate(face_features, image_features)[0]

    def forward_with_gate(
        self, face_features: ImageFeatures, image_features: ImageFeatures
    ) -> tuple[ImageFeatures, Tensor]:
        """The mixture and its gate, both [batch, views, tokens, width]: 1 where only the face is heard."""
        shape = image_features.tokens.shape[:2]
        if self.mode == "image":
            mixed = self._encode_image(image_features)
            gate = torch.zeros_like(mixed)
        elif self.mode == "face":
            mixed = self._encode_face(face_features)
            gate = torch.ones_like(mixed)
        else:
            face_tokens, image_tokens = (
                self._encode_face(face_features),
                self._encode_image(image_features),
            )
            gate = torch.full_like(face_tokens, 0.5)
            if self.mode == "gate":
                gate = torch.sigmoid(self.gate(torch.cat([face_tokens, image_tokens], -1)))
            mixed = gate * face_tokens + (1 - gate) * image_tokens
        return ImageFeatures(mixed.unflatten(0, shape)), gate.unflatten(0, shape)

    def _encode_face(self, face_features: ImageFeatures) -> Tensor:
        """[batch * views, tokens, width]."""
        face_tokens: Tensor = self.norms[0](
            self.face_proj(face_features.tokens.flatten(0, 1)[:, 0])
        )
        return face_tokens

    def _encode_image(self, image_features: ImageFeatures) -> Tensor:
        """[batch * views, tokens, width]."""
        keys = self.image_proj(image_features.tokens.flatten(0, 1))
        attn_output, _ = self.cross_attn(
            self.queries.expand(len(keys), -1, -1), keys, keys, need_weights=False
        )
        image_tokens: Tensor = self.norms[1](attn_output)
        return image_tokens
