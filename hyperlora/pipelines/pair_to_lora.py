"""``PairToLora``: a picture before and after an edit in, the LoRA that makes the same edit on any picture out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from hyperlora.data.edit_pairs import read_pair
from hyperlora.data.images import Source, sha256_of, to_tensor
from hyperlora.diffusion.diffusion_base import Base
from hyperlora.encoders.timm_encoder import VisionEncoder
from hyperlora.errors import BadRequest
from hyperlora.features import ImageFeatures
from hyperlora.lora.io.metadata import LoraHeader
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.pair_hypernetwork import ChangeNetwork
from hyperlora.pipelines.pretrained_model import ReleasedModel

SourcePair = tuple[Source, Source]


class PairToLora(ReleasedModel):
    """A picture encoder, which both pictures of a pair go through, and the network that makes a LoRA of what changed:
    one released artifact (LoRA of Change, 2411.19156).

    ``PairToLora.from_pretrained(folder_or_hub_id)(("before.png", "after.png"))`` is a LoRA for ``layout.base``, an
    InstructPix2Pix pipeline. The LoRA of the pair turned round undoes the edit. Its negative does too: it is the same
    without words in the network, and says what was before if their ``Vocabulary`` has words for the way ``back``.

    Raises ``BadRequest`` if the network points at pixels, and the encoder does not show as many.
    """

    def __init__(self, encoder: VisionEncoder, network: ChangeNetwork, card: dict[str, Any] | None = None) -> None:
        super().__init__()
        pixels = network.wording.pixels if network.wording else 0
        if pixels not in (0, encoder.colours):
            raise BadRequest(
                f"words point at {pixels}×{pixels} pixels of each place, the encoder shows {encoder.colours}×"
                f"{encoder.colours}: give both the same number (pixels and colours)"
            )
        self.encoder, self.network = encoder, network
        self.card = card or {}

    @property
    def layout(self) -> LoraLayout:
        return self.network.layout

    @property
    def steps(self) -> int:
        """Denoising steps that suit its LoRAs, as the card tells."""
        return int(self.card.get("steps", 20))

    @property
    def further(self) -> Sequence[str]:
        """Words that its base knows and it cannot say (``hyperlora.pipelines.instruction_search``)."""
        return self.network.wording.vocabulary.further if self.network.wording else ()

    def parts(self) -> dict[str, Any]:
        return {"encoder": self.encoder.config, "network": self.network.config}

    @classmethod
    def built(cls, config: dict[str, Any], layout: LoraLayout, folder: Path, base: Base | None) -> Self:
        return cls(VisionEncoder(**config["encoder"]), ChangeNetwork(layout, **config["network"]))

    @torch.no_grad()
    def __call__(self, pairs: SourcePair | Sequence[SourcePair], strength: float = 1.0) -> LoraWeights:
        """One LoRA (no batch axis) from one or several pairs that show the same edit. A ``strength`` below 0 undoes it:
        that is the LoRA of the pairs turned round.

        Raises ``BadImage`` for a picture that cannot be read, ``BadRequest`` for none or for one whose two pictures are
        not of the same size.
        """
        weights = self.forward(self.shown(pairs, strength)[None])[0]
        return weights * abs(strength) if abs(strength) != 1 else weights

    def shown(self, pairs: SourcePair | Sequence[SourcePair], strength: float = 1.0, size: int | None = None) -> Tensor:
        """One or several pairs as ``seen`` gives them, turned round for a ``strength`` below 0; raises as a call."""
        if not pairs:
            raise BadRequest("no pair given: at least one picture before and one after are needed")
        several = pairs if isinstance(pairs[0], tuple | list) else [pairs]
        seen = self.seen([read_pair(*pair) for pair in several], size)  # type: ignore[misc]
        return seen if strength >= 0 else seen.flip(1)

    def seen(self, pairs: Sequence[tuple[Image.Image, Image.Image]], size: int | None = None) -> Tensor:
        """Pictures [pairs, 2, 3, size, size] in [0, 1], of the encoder's size or one that it shrinks itself."""
        size = size or self.encoder.image_size
        return torch.stack([torch.stack([to_tensor(p, size) for p in pair]) for pair in pairs]).to(self.device)

    def forward(self, pairs: Tensor) -> LoraWeights:
        """pairs [batch, views, 2, 3, h, w] in [0, 1], of each the picture before and after."""
        return self.from_features(self.encoder(pairs[:, :, 0]), self.encoder(pairs[:, :, 1]))

    def from_features(self, before: ImageFeatures, after: ImageFeatures) -> LoraWeights:
        """Of what the encoder says about the pictures."""
        return self.strong(self.network(before, after))


def change_header(model: PairToLora, title: str, pairs: Sequence[SourcePair], **extra: str) -> LoraHeader:
    """Provenance of the LoRA of a change; ``pairs`` are paths or file bytes."""
    return LoraHeader(
        title=title,
        architecture=model.card.get("architecture", "stable-diffusion-v1"),
        license=model.card.get("license", ""),
        encoder=str(model.encoder.config["name"]),
        encoder_license=model.encoder.licence,
        reference_sha256=tuple(sha256_of(side) for pair in pairs for side in pair if not isinstance(side, Image.Image)),
        extra=extra,
    )
