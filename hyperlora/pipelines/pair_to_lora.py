"""``PairToLora``: a picture before and after an edit in, the LoRA that makes the same edit on any picture out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from hyperlora.data.edit_pairs import read_image_pair
from hyperlora.data.images import ImageSource, compute_sha256, to_tensor
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.pair_hypernetwork import PairHypernetwork
from hyperlora.pipelines.pretrained_model import PretrainedModel

ImageSourcePair = tuple[ImageSource, ImageSource]


class PairToLora(PretrainedModel):
    """A picture encoder, which both pictures of a pair go through, and the network that makes a LoRA of what changed:
    one released artifact (LoRA of Change, 2411.19156).

    ``PairToLora.from_pretrained(folder_or_hub_id)(("before.png", "after.png"))`` is a LoRA for ``layout.base``, an
    InstructPix2Pix pipeline. The LoRA of the pair turned round undoes the edit. Its negative does too: it is the same
    without words in the network, and says what was before if their ``InstructionVocabulary`` has words for the way ``back``.

    Raises ``InvalidArgumentError`` if the network points at pixels, and the encoder does not show as many.
    """

    def __init__(
        self, encoder: TimmEncoder, network: PairHypernetwork, card: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        patch_pixels = network.instruction_head.patch_pixels if network.instruction_head else 0
        if patch_pixels not in (0, encoder.patch_pixels):
            raise InvalidArgumentError(
                f"words point at {patch_pixels}×{patch_pixels} pixels of each place, the encoder shows {encoder.patch_pixels}×"
                f"{encoder.patch_pixels}: give both the same number (pixels and colours)"
            )
        self.encoder, self.network = encoder, network
        self.card = card or {}

    @property
    def layout(self) -> LoraLayout:
        return self.network.layout

    @property
    def num_inference_steps(self) -> int:
        """Denoising steps that suit its LoRAs, as the card tells."""
        return int(self.card.get("steps", 20))

    @property
    def zero_shot_prompts(self) -> Sequence[str]:
        """Words that its base knows and it cannot say (``main_callback.pipelines.instruction_search``)."""
        return (
            self.network.instruction_head.vocabulary.zero_shot_prompts
            if self.network.instruction_head
            else ()
        )

    def to_config(self) -> dict[str, Any]:
        return {"encoder": self.encoder.config, "network": self.network.config}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], layout: LoraLayout, folder: Path, base: DiffusionBase | None
    ) -> Self:
        return cls(TimmEncoder(**config["encoder"]), PairHypernetwork(layout, **config["network"]))

    @torch.no_grad()
    def __call__(
        self, pairs: ImageSourcePair | Sequence[ImageSourcePair], strength: float = 1.0
    ) -> LoraWeights:
        """One LoRA (no batch axis) from one or several pairs that show the same edit. A ``strength`` below 0 undoes it:
        that is the LoRA of the pairs turned round.

        Raises ``InvalidImageError`` for a picture that cannot be read, ``InvalidArgumentError`` for none or for one whose two pictures are
        not of the same size.
        """
        weights = self.forward(self.preprocess_pairs(pairs, strength)[None])[0]
        return weights * abs(strength) if abs(strength) != 1 else weights

    def preprocess_pairs(
        self,
        pairs: ImageSourcePair | Sequence[ImageSourcePair],
        strength: float = 1.0,
        image_size: int | None = None,
    ) -> Tensor:
        """One or several pairs as ``stack_pairs`` gives them, turned round for a ``strength`` below 0; raises as a call."""
        if not pairs:
            raise InvalidArgumentError(
                "no pair given: at least one picture before and one after are needed"
            )
        pair_list = pairs if isinstance(pairs[0], tuple | list) else [pairs]
        pixels = self.stack_pairs([read_image_pair(*pair) for pair in pair_list], image_size)  # type: ignore[misc]
        return pixels if strength >= 0 else pixels.flip(1)

    def stack_pairs(
        self, pairs: Sequence[tuple[Image.Image, Image.Image]], image_size: int | None = None
    ) -> Tensor:
        """Pictures [pairs, 2, 3, size, size] in [0, 1], of the encoder's size or one that it shrinks itself."""
        image_size = image_size or self.encoder.image_size
        return torch.stack(
            [torch.stack([to_tensor(image, image_size) for image in pair]) for pair in pairs]
        ).to(self.device)

    def forward(self, pairs: Tensor) -> LoraWeights:
        """pairs [batch, views, 2, 3, h, w] in [0, 1], of each the picture before and after."""
        return self.generate_from_features(
            self.encoder(pairs[:, :, 0]), self.encoder(pairs[:, :, 1])
        )

    def generate_from_features(self, before: ImageFeatures, after: ImageFeatures) -> LoraWeights:
        """Of what the encoder says about the pictures."""
        return self.apply_strength(self.network(before, after))


def make_edit_metadata(
    model: PairToLora, title: str, pairs: Sequence[ImageSourcePair], **extra_metadata: str
) -> LoraMetadata:
    """Provenance of the LoRA of a change; ``pairs`` are paths or file bytes."""
    return LoraMetadata(
        title=title,
        architecture=model.card.get("architecture", "stable-diffusion-v1"),
        license=model.card.get("license", ""),
        encoder=str(model.encoder.config["name"]),
        encoder_license=model.encoder.license,
        reference_sha256=tuple(
            compute_sha256(source)
            for pair in pairs
            for source in pair
            if not isinstance(source, Image.Image)
        ),
        extra=extra_metadata,
    )
