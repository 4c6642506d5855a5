"""``PairToLora``: an image before and after an edit in, the LoRA of the same edit out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol, Self, cast

import torch
from PIL import Image
from torch import Tensor

from hyperlora.data.edit_pairs import read_image_pair
from hyperlora.data.images import ImageSource, to_tensor
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures
from hyperlora.lora.io.lora import Lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.pair_hypernetwork import PairHypernetwork
from hyperlora.pipelines.model_card import ModelCard
from hyperlora.pipelines.pretrained_model import PretrainedModel

ImageSourcePair = tuple[ImageSource, ImageSource]
"""An image before and after an edit."""
DEFAULT_NUM_INFERENCE_STEPS: Final = 20
"""Denoising steps of edited images where the card names none."""


class PairSearch(Protocol):
    """A search that replaces the forward pass of a ``PairToLora`` (``InstructionSearch``)."""

    @property
    def resolution(self) -> int:
        """Pixels per side of the images that the search needs."""

    def __call__(self, model: "PairToLora", pairs: Tensor) -> LoraWeights:
        """Generate the LoRA of one edit.

        Args:
            model: The model whose LoRA is improved.
            pairs: Pairs that show the edit, [pairs, 2, 3, size, size] in [0, 1].

        Returns:
            One LoRA without batch axis.
        """


class PairToLora(PretrainedModel):
    """An image encoder and the network from pairs to LoRAs (LoRA of Change, 2411.19156).

    Example: ``PairToLora.from_pretrained(folder_or_hub_id)(("before.png", "after.png"))`` is a LoRA
    for ``layout.base``, an InstructPix2Pix pipeline. The LoRA of the swapped pair undoes the edit.
    So does the negated LoRA: exactly so without an instruction head, and with one whose vocabulary
    has an ``undo_template``.

    Args:
        encoder: The encoder of both images, frozen.
        network: The network from the features of both images to LoRA weights.
        card: License, resolution and steps.

    Raises:
        InvalidArgumentError: The network reads other patches of pixels than the encoder returns.
    """

    def __init__(
        self, encoder: TimmEncoder, network: PairHypernetwork, card: ModelCard | None = None
    ) -> None:
        super().__init__()
        patch_pixels = (
            network.instruction_head.config.patch_pixels if network.instruction_head else 0
        )
        if patch_pixels not in (0, encoder.patch_pixels):
            raise InvalidArgumentError(
                f"the instruction head reads {patch_pixels}×{patch_pixels} pixels of each patch, "
                f"the encoder returns {encoder.patch_pixels}×{encoder.patch_pixels}: "
                "give both the same patch_pixels"
            )
        self.encoder, self.network = encoder, network
        self.card = card or ModelCard()

    @property
    def layout(self) -> LoraLayout:
        """The layout of the LoRAs."""
        return self.network.layout

    @property
    def num_inference_steps(self) -> int:
        """Recommended denoising steps of edited images."""
        return self.card.num_inference_steps or DEFAULT_NUM_INFERENCE_STEPS

    @property
    def zero_shot_prompts(self) -> Sequence[str]:
        """Instructions that the base understands and the network does not predict."""
        if self.network.instruction_head is None:
            return ()
        return self.network.instruction_head.vocabulary.zero_shot_prompts

    def to_config(self) -> dict[str, Any]:
        """Return the arguments of the encoder and the network."""
        return {"encoder": self.encoder.config, "network": self.network.config}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], layout: LoraLayout, folder: Path, base: DiffusionBase | None
    ) -> Self:
        """Build the network with random weights.

        Args:
            config: The content of ``config.json``.
            layout: The layout of the LoRAs.
            folder: Not used.
            base: Not used.

        Returns:
            The network.
        """
        return cls(TimmEncoder(**config["encoder"]), PairHypernetwork(layout, **config["network"]))

    @torch.no_grad()
    def __call__(
        self,
        pairs: ImageSourcePair | Sequence[ImageSourcePair],
        strength: float = 1.0,
        search: PairSearch | None = None,
    ) -> Lora:
        """Generate a LoRA from one or several pairs that show the same edit.

        Args:
            pairs: A pair or several: paths, file bytes or PIL images.
            strength: A factor of the LoRA; below 0 it is the LoRA of the swapped pairs.
            search: Tries instructions on the base; None for the forward pass alone.

        Returns:
            The LoRA with complete file metadata.

        Raises:
            InvalidImageError: An image cannot be read.
            InvalidArgumentError: There is no pair, or two images of a pair differ in size.
        """
        pair_list = _list_pairs(pairs)
        pixels = self.preprocess_pairs(pair_list, strength, self.get_pair_size(search))
        weights = self.generate(pixels[None], search)[0]
        lora = Lora(weights, self.make_metadata("", pair_list))
        return lora * abs(strength) if abs(strength) != 1 else lora

    @torch.no_grad()
    def generate(self, pairs: Tensor, search: PairSearch | None = None) -> LoraWeights:
        """Generate the LoRAs of several edits from pixels.

        Args:
            pairs: [batch, views, 2, 3, size, size] in [0, 1]: for each edit its pairs, and of each
                pair the image before and after.
            search: Tries instructions on the base, for one edit at a time; None for one forward
                pass of the whole batch.

        Returns:
            One LoRA per edit (batch axis).
        """
        if search is None:
            return self.forward(pairs)
        return LoraWeights.stack([search(self, edit_pairs) for edit_pairs in pairs])

    def get_pair_size(self, search: PairSearch | None = None) -> int:
        """Return the pixels per side that ``generate`` needs.

        Args:
            search: The search that ``generate`` runs; its base may need larger images than the
                encoder.

        Returns:
            Pixels per side.
        """
        return max(search.resolution if search else 0, self.encoder.image_size)

    def preprocess_pairs(
        self,
        pairs: ImageSourcePair | Sequence[ImageSourcePair],
        strength: float = 1.0,
        image_size: int | None = None,
    ) -> Tensor:
        """Read one or several pairs.

        Args:
            pairs: A pair or several: paths, file bytes or PIL images.
            strength: Pairs are swapped if it is below 0.
            image_size: As for ``stack_pairs``.

        Returns:
            [pairs, 2, 3, size, size] in [0, 1].

        Raises:
            InvalidImageError: An image cannot be read.
            InvalidArgumentError: There is no pair, or two images of a pair differ in size.
        """
        images = [read_image_pair(*pair) for pair in _list_pairs(pairs)]
        pixels = self.stack_pairs(images, image_size)
        return pixels if strength >= 0 else pixels.flip(1)

    def stack_pairs(
        self, pairs: Sequence[tuple[Image.Image, Image.Image]], image_size: int | None = None
    ) -> Tensor:
        """Convert pairs of images to pixels.

        Args:
            pairs: The image before and after, of any size.
            image_size: Pixels per side of the result, which the encoder resizes itself; the
                encoder's size if None.

        Returns:
            [pairs, 2, 3, size, size] in [0, 1].
        """
        size = image_size or self.encoder.image_size
        return torch.stack(
            [torch.stack([to_tensor(image, size) for image in pair]) for pair in pairs]
        )

    def forward(self, pairs: Tensor) -> LoraWeights:
        """Generate the LoRAs of several edits in one forward pass.

        Args:
            pairs: [batch, views, 2, 3, size, size] in [0, 1], on any device.

        Returns:
            One LoRA per edit (batch axis), on the device of the model.
        """
        before, after = self.encoder(pairs[:, :, 0]), self.encoder(pairs[:, :, 1])
        return self.generate_from_features(before, after)

    def generate_from_features(self, before: ImageFeatures, after: ImageFeatures) -> LoraWeights:
        """Generate the LoRAs of several edits from encoded images.

        Args:
            before: The features of the images before the edit, [batch, pairs, tokens, width].
            after: Those of the images after it.

        Returns:
            One LoRA per edit (batch axis).
        """
        return self.apply_strength(self.network(before, after))

    def make_metadata(
        self, title: str, pairs: Sequence[ImageSourcePair], **extra: str
    ) -> LoraMetadata:
        """Make the file metadata of a LoRA of this model.

        Args:
            title: The name of the LoRA.
            pairs: The pairs that it is generated from; PIL images are not recorded.
            **extra: Further keys of the file, e.g. ``hyperlora.consent``.

        Returns:
            Title, licenses, architecture, resolution and SHA-256 of the images.

        Raises:
            InvalidImageError: A path of ``pairs`` cannot be read.
        """
        encoder = str(self.encoder.config["name"]), self.encoder.license
        references = [image for pair in pairs for image in pair]
        return self.card.make_metadata(title, references, encoder, extra)


def _list_pairs(
    pairs: ImageSourcePair | Sequence[ImageSourcePair],
) -> Sequence[ImageSourcePair]:
    """Return the pairs as a sequence, also if only one is given."""
    if not pairs:
        raise InvalidArgumentError(
            "no pair given: at least one image before and one after the edit are needed"
        )
    if isinstance(pairs[0], tuple | list):
        return cast(Sequence[ImageSourcePair], pairs)
    return [cast(ImageSourcePair, pairs)]
