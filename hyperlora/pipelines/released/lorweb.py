"""``LorwebModel``: the LoRA of an edit for one target image, for FLUX.1 Kontext.

A pair (a, a') shows the edit, b is the image to edit. The LoRA depends on all three, and works with
the two-by-two sheet (a, a' / b, b) as the input image: the edited b is the sheet's lower right.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Self

import torch
from PIL import Image

from hyperlora.compute import ComputeConfig
from hyperlora.data.images import ImageSource, read_image, stack_images
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.image_editing import edit_images
from hyperlora.encoders.released_encoders import ClipImageEncoder, make_clip_config
from hyperlora.encoders.streamed_encoder import TensorFiles
from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.lora.io.lora import Lora
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.lorweb import NUM_QUERY_IMAGES, list_lorweb_targets, mix_lorweb
from hyperlora.pipelines.released.cards import ReleasedCard, find_card
from hyperlora.pipelines.released.hub_files import ReleasedFiles, open_files
from hyperlora.pipelines.released.recognize import Recognition, recognize
from hyperlora.pipelines.released.released_model import ReleasedOptions

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig

CLIP_ID: Final = "openai/clip-vit-large-patch14"
CLIP_FILE: Final = "model.safetensors"
_SHEET_MULTIPLE: Final = 32
"""Pixels that the sides of a sheet are multiples of: two quadrants of whole 2x2 latent patches."""


class LorwebModel:
    """The basis of LoRAs and the image encoder whose embeddings mix them.

    Args:
        facts: Base and licenses.
        network_path: The basis.
        clip_path: The weights of CLIP-L, or of its vision half.
        compute: Device and precision of the encoder; None for the CPU.
        clip_config: Sizes of another CLIP.

    Attributes:
        facts: Base, licenses and settings, from the table.

    Raises:
        ModelLoadError: A file is not whole, or is of another network.
    """

    kind: ClassVar[str] = "lorweb"

    def __init__(
        self,
        facts: ReleasedCard,
        network_path: Path,
        clip_path: Path,
        compute: ComputeConfig | None = None,
        clip_config: "CLIPVisionConfig | None" = None,
    ) -> None:
        self.facts = facts
        self.files = TensorFiles([network_path])
        self.targets = list_lorweb_targets(self.files.shapes, network_path.name)
        device = compute.torch_device if compute else torch.device("cpu")
        self.encoder = ClipImageEncoder(clip_path, clip_config or make_clip_config(), device)
        if (width := self.targets[0].embedding_dim) != self.encoder.width:
            raise ModelLoadError(
                f"{network_path.name} reads embeddings of {width} numbers, {clip_path.name} makes "
                f"{self.encoder.width}: give the CLIP that it was trained with"
            )

    @classmethod
    def from_files(
        cls,
        files: ReleasedFiles,
        recognition: Recognition,
        options: ReleasedOptions,
        compute: ComputeConfig | None = None,
    ) -> Self:
        """Open the network; its encoder is fetched too.

        Args:
            files: The files of the repository.
            recognition: Kind and file of the network.
            options: Folder or hub id of CLIP-L, and how to fetch.
            compute: Device and precision of the encoder; None for the CPU.

        Returns:
            The model.

        Raises:
            ModelLoadError: A file is missing, not whole or of another network.
        """
        (network_file,) = recognition.files
        clip_files = open_files(options.encoder or CLIP_ID, offline=options.offline)
        clip_files.check_file(CLIP_FILE)
        network_path = files.fetch(network_file)
        return cls(find_card("lorweb"), network_path, clip_files.fetch(CLIP_FILE), compute)

    @property
    def layout(self) -> LoraLayout:
        """The layout of the exact LoRAs."""
        targets = tuple(target.target for target in self.targets)
        return LoraLayout(targets, self.targets[0].rank, self.facts.base)

    @torch.no_grad()
    def __call__(
        self,
        before: ImageSource,
        after: ImageSource,
        image: ImageSource,
        strength: float = 1.0,
        rank: int | None = None,
    ) -> Lora:
        """Generate the LoRA that repeats an edit on one image.

        Args:
            before: An image before the edit.
            after: The same image after it.
            image: The image to edit; the LoRA is for it alone.
            strength: A factor of the LoRA.
            rank: The rank after an SVD; None for the exact LoRA, of rank 128.

        Returns:
            The LoRA with complete file metadata.

        Raises:
            InvalidImageError: An image cannot be read.
            InvalidArgumentError: The rank is out of range.
        """
        images = [read_image(source) for source in (before, after, image)]
        weights = self.generate(make_sheet(*images), rank)
        lora = Lora(weights, self.make_metadata("", [before, after, image]))
        return lora * strength if strength != 1 else lora

    @torch.no_grad()
    def generate(self, sheet: Image.Image, rank: int | None = None) -> LoraWeights:
        """Generate the LoRA of a sheet.

        Args:
            sheet: What ``make_sheet`` returns.
            rank: The rank after an SVD; None for the exact LoRA.

        Returns:
            One LoRA without batch axis.

        Raises:
            InvalidArgumentError: The rank is out of range.
        """
        exact_rank = self.targets[0].rank
        if rank is not None and not 1 <= rank <= exact_rank:
            raise InvalidArgumentError(
                f"rank {rank} is out of range: LoRAs of this network have a rank from 1 to "
                f"{exact_rank}"
            )
        quadrants = cut_sheet(sheet)
        embeddings = self.encoder.encode(quadrants[:NUM_QUERY_IMAGES])  # [3, projection]
        return mix_lorweb(
            self.targets,
            self.files.read,
            embeddings,
            self.facts.base,
            None if rank == exact_rank else rank,
        )

    def make_metadata(
        self, title: str, images: Sequence[ImageSource], **extra: str
    ) -> LoraMetadata:
        """Make the file metadata of a LoRA.

        Args:
            title: The name of the LoRA.
            images: The three images; PIL images are not recorded.
            **extra: Further keys of the file.

        Returns:
            Title, licenses of network, encoder and base, and SHA-256 of the images.

        Raises:
            InvalidImageError: A path of ``images`` cannot be read.
        """
        (encoder,) = self.facts.list_parts("encoder")
        metadata = self.facts.make_model_card().make_metadata(
            title, images, (encoder.name, encoder.license), self.facts.make_metadata() | extra
        )
        return replace(metadata, recommended_strength=self.facts.strength)


def find_lorweb(name: str) -> tuple[ReleasedFiles, Recognition] | None:
    """Find LoRWeB where a name stands for it; nothing but headers is read.

    Args:
        name: A folder or hub id.

    Returns:
        What ``LorwebModel.from_files`` takes; None for a model of hyperlora itself, and for what
        cannot be found.

    Raises:
        ModelLoadError: The network makes no LoRAs of edits, or is not whole.
    """
    try:
        files = open_files(name)
    except ModelLoadError:
        return None
    if "config.json" in files.sizes or not any(p.endswith(".safetensors") for p in files.sizes):
        return None
    recognition = recognize(files)
    if recognition.kind != "lorweb":
        raise ModelLoadError(
            f"{name!r} makes LoRAs of photos (kind {recognition.kind}), not of edits: "
            "use `hyperlora generate`"
        )
    return files, recognition


def make_sheet(before: Image.Image, after: Image.Image, image: Image.Image) -> Image.Image:
    """Make the two-by-two sheet (before, after / image, image), all at the size of ``before``.

    Args:
        before: An image before the edit.
        after: The same image after it.
        image: The image to edit.

    Returns:
        An RGB image of twice the width and height.
    """
    width, height = before.size
    after, image = (
        other.resize((width, height), Image.Resampling.BICUBIC) for other in (after, image)
    )
    sheet = Image.new("RGB", (2 * width, 2 * height))
    for i, quadrant in enumerate((before, after, image, image)):
        sheet.paste(quadrant, (i % 2 * width, i // 2 * height))
    return sheet


def cut_sheet(sheet: Image.Image) -> list[Image.Image]:
    """Cut a sheet at half of its sides.

    Args:
        sheet: An image of even sides.

    Returns:
        The four quadrants in reading order.
    """
    width, height = (side // 2 for side in sheet.size)
    return [
        sheet.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))
        for y in (0, 1)
        for x in (0, 1)
    ]


def edit_sheet(
    base: DiffusionBase,
    sheet: Image.Image,
    lora: LoraWeights,
    *,
    seed: int,
    instruction: str = "",
    num_inference_steps: int | None = None,
) -> Image.Image:
    """Edit the lower image of a sheet by its LoRA.

    Args:
        base: FLUX.1 Kontext.
        sheet: What ``make_sheet`` returns.
        lora: What ``LorwebModel.generate`` returns for it.
        seed: Seed of the noise.
        instruction: Text that says what the edit is.
        num_inference_steps: Denoising steps; None for the authors' number.

    Returns:
        The edited image, at half of the sides at which the sheet is drawn.

    Raises:
        InvalidArgumentError: The base does not edit images.
        LayoutMismatchError: The LoRA is for another base.
    """
    facts = find_card("lorweb")
    sides = _scale_sides(sheet.size, base.resolution)
    pixels = stack_images([sheet.resize(sides, Image.Resampling.BICUBIC)])  # [1, 3, h, w]
    (edited,) = edit_images(
        base,
        pixels,
        lora,
        seeds=[seed],
        instructions=instruction,
        num_inference_steps=num_inference_steps or facts.num_inference_steps,
        guidance_scale=facts.guidance_scale,
    )
    return cut_sheet(edited)[-1]


def _scale_sides(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """Scale a size to the area of the base's images, at its aspect ratio."""
    scale = resolution / (size[0] * size[1]) ** 0.5
    width, height = (
        max(1, round(side * scale / _SHEET_MULTIPLE)) * _SHEET_MULTIPLE for side in size
    )
    return width, height
