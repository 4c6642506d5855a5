"""``MixtureOfFeatures``: what a face and an image network say about a photo, as one condition (MIF; 2408.06740).

z = g ⊙ E_face(x) + (1 - g) ⊙ E_image(x)        g = σ(gate(E_face, E_image)), per token and channel
"""

from typing import Any, Final

import torch
from torch import Tensor, nn

from hyperlora.errors import BadRequest
from hyperlora.features import ImageFeatures

GATES: Final = ("gate", "average", "face", "image")


class MixtureOfFeatures(nn.Module):
    """Face features [batch, views, 1, face_width] and image tokens [batch, views, n, image_width] to tokens
    [batch, views, tokens, width].

    Learned queries look at the image's tokens; the face's vector is unfolded to as many tokens. ``mode`` is ``gate``,
    or for comparison ``average`` (g = 1/2), ``face`` (1) or ``image`` (0); what is not heard has no weights.
    """

    def __init__(
        self,
        face_width: int,
        image_width: int,
        width: int = 128,
        tokens: int = 16,
        heads: int = 4,
        mode: str = "gate",
    ) -> None:
        super().__init__()
        if mode not in GATES:
            raise BadRequest(f"unknown mixture {mode!r}; known: {', '.join(GATES)}")
        self.mode, self.width = mode, width
        self.config: dict[str, Any] = {
            "face_width": face_width, "image_width": image_width, "width": width, "tokens": tokens, "heads": heads,
            "mode": mode,
        }  # fmt: skip
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        if mode != "image":
            self.face = nn.Sequential(
                nn.LayerNorm(face_width), nn.Linear(face_width, tokens * width), nn.Unflatten(-1, (tokens, width))
            )
        if mode != "face":
            self.image = nn.Sequential(nn.LayerNorm(image_width), nn.Linear(image_width, width))
            self.queries = nn.Parameter(torch.randn(tokens, width) * 0.02)
            self.look = nn.MultiheadAttention(width, heads, batch_first=True)
        if mode == "gate":
            self.gate = nn.Linear(2 * width, width)
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def forward(self, face: ImageFeatures, image: ImageFeatures) -> ImageFeatures:
        return self.mixed(face, image)[0]

    def mixed(self, face: ImageFeatures, image: ImageFeatures) -> tuple[ImageFeatures, Tensor]:
        """The mixture and its gate, both [batch, views, tokens, width]: 1 where only the face is heard."""
        shape = image.tokens.shape[:2]
        if self.mode == "image":
            heard = self._of_image(image)
            gate = torch.zeros_like(heard)
        elif self.mode == "face":
            heard = self._of_face(face)
            gate = torch.ones_like(heard)
        else:
            one, other = self._of_face(face), self._of_image(image)
            gate = torch.full_like(one, 0.5)
            if self.mode == "gate":
                gate = torch.sigmoid(self.gate(torch.cat([one, other], -1)))
            heard = gate * one + (1 - gate) * other
        return ImageFeatures(heard.unflatten(0, shape)), gate.unflatten(0, shape)

    def _of_face(self, face: ImageFeatures) -> Tensor:
        """[batch * views, tokens, width]."""
        found: Tensor = self.norms[0](self.face(face.tokens.flatten(0, 1)[:, 0]))
        return found

    def _of_image(self, image: ImageFeatures) -> Tensor:
        """[batch * views, tokens, width]."""
        seen = self.image(image.tokens.flatten(0, 1))
        looked, _ = self.look(self.queries.expand(len(seen), -1, -1), seen, seen, need_weights=False)
        found: Tensor = self.norms[1](looked)
        return found
