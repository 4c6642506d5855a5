"""``ImageToLoraV1``: i2L v1 of DiffSynth-Studio, images to the LoRA of their style.

SigLIP2-G384 and DINOv3-7B encode the images, a decoder of linear bottlenecks makes the LoRA. All
three are read layer by layer, so memory stays small at any size.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Self

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import override

from hyperlora.compute import ComputeConfig
from hyperlora.encoders.pixel_values import crop_center_square
from hyperlora.encoders.released_encoders import (
    Dinov3Encoder,
    SiglipEncoder,
    make_dinov3_config,
    make_siglip2_config,
)
from hyperlora.encoders.streamed_encoder import TensorFiles
from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.i2l import I2lConfig, decode_i2l, infer_i2l_config
from hyperlora.pipelines.config import LoraSampling
from hyperlora.pipelines.photo_model import SubjectPhotos
from hyperlora.pipelines.released.cards import ReleasedCard, find_card
from hyperlora.pipelines.released.hub_files import ReleasedFiles, open_files
from hyperlora.pipelines.released.recognize import I2L_DIGESTS, Recognition
from hyperlora.pipelines.released.released_model import ReleasedModel, ReleasedOptions

if TYPE_CHECKING:
    from transformers import DINOv3ViTConfig, SiglipVisionConfig

ENCODERS_ID: Final = "DiffSynth-Studio/General-Image-Encoders"
SIGLIP2_FILE: Final = "SigLIP2-G384/model.safetensors"
DINOV3_FILE: Final = "DINOv3-7B/model.safetensors"
IMAGE_SIZE: Final = 1024
"""Pixels per side of the center square that both encoders see."""
_MIN_SIDE: Final = 224
"""Pixels of the shorter side below which the encoders see enlarged pixels alone."""


@dataclass(frozen=True)
class StyleFeatures:
    """The embeddings of the images of several subjects.

    Attributes:
        embeddings: [subjects, images, 5632].
        min_sides: Pixels of the shortest side among the images of each subject.
    """

    embeddings: Tensor
    min_sides: tuple[int, ...]


class ImageToLoraV1(ReleasedModel[StyleFeatures]):
    """The i2L decoder and its two encoders.

    Args:
        facts: Base, licenses and settings.
        network_path: The decoder's file.
        siglip_path: The file of SigLIP2-G384.
        dinov3_path: The file of DINOv3-7B.
        compute: Device and precision of the encoders; None for the CPU. ``auto`` is bfloat16 where
            the device computes fast in it.
        siglip_config: Sizes of another SigLIP2 than the released one.
        dinov3_config: Sizes of another DINOv3.

    Raises:
        ModelLoadError: A file is not whole, or is of another network.
        InvalidArgumentError: The decoder needs tokens of a language model.
    """

    method: ClassVar[str] = "i2l-v1"

    def __init__(
        self,
        facts: ReleasedCard,
        network_path: Path,
        siglip_path: Path,
        dinov3_path: Path,
        compute: ComputeConfig | None = None,
        siglip_config: "SiglipVisionConfig | None" = None,
        dinov3_config: "DINOv3ViTConfig | None" = None,
    ) -> None:
        super().__init__(facts, compute)
        self._paths = (network_path, siglip_path, dinov3_path)
        self.files = TensorFiles([network_path])
        self.config = infer_i2l_config(self.files.shapes, network_path.name)
        _check_inputs(self.config, facts.variant)
        dtype = compute.torch_dtype if compute and compute.dtype != "auto" else None
        self.siglip = SiglipEncoder(
            siglip_path, siglip_config or make_siglip2_config(), self.device, dtype
        )
        self.dinov3 = Dinov3Encoder(
            dinov3_path, dinov3_config or make_dinov3_config(), self.device, dtype
        )
        if (width := self.siglip.width + self.dinov3.width) != self.config.embedding_dim:
            raise ModelLoadError(
                f"{network_path.name} reads embeddings of {self.config.embedding_dim} numbers, the "
                f"encoders make {width}: give the encoders that it was trained with"
            )

    @classmethod
    @override
    def from_files(
        cls,
        files: ReleasedFiles,
        recognition: Recognition,
        options: ReleasedOptions,
        compute: ComputeConfig | None = None,
    ) -> Self:
        """Open the network and its encoders, nothing large before all files are known."""
        (network_file,) = recognition.files
        header = files.read_header(network_file)
        if header.digest[:8] not in I2L_DIGESTS:
            raise ModelLoadError(
                f"{files.name}/{network_file} is built like i2L, and is none of its released "
                f"networks: its names and shapes have the digest {header.digest[:8]}, known are "
                f"{', '.join(I2L_DIGESTS)}; give one of these"
            )
        shapes = {name: entry.shape for name, entry in header.tensors.items()}
        _check_inputs(infer_i2l_config(shapes, network_file), recognition.variant)
        facts = find_card("i2l-v1", recognition.variant)
        encoder_files = open_files(options.encoder or ENCODERS_ID, offline=options.offline)
        for path in (SIGLIP2_FILE, DINOV3_FILE):  # before anything large is fetched
            encoder_files.check_file(path)
        return cls(
            facts,
            files.fetch(network_file),
            encoder_files.fetch(SIGLIP2_FILE),
            encoder_files.fetch(DINOV3_FILE),
            compute,
        )

    @property
    @override
    def layout(self) -> LoraLayout:
        """The layout of the LoRA of one image."""
        return self.config.make_layout(1, self.facts.base)

    @override
    def encode_subjects(self, subjects: Sequence[SubjectPhotos]) -> StyleFeatures:
        """Encode the images; each encoder reads its weights once for all subjects."""
        counts = {len(subject.images) for subject in subjects}
        if len(counts) != 1 or 0 in counts:
            raise InvalidArgumentError(
                "every subject needs at least one image, and all of a batch equally many"
            )
        images = [image for subject in subjects for image in subject.images]
        embeddings = self.encode_images(images)  # [subjects * images, 5632]
        return StyleFeatures(
            embeddings.unflatten(0, (len(subjects), -1)),
            tuple(min(min(image.size) for image in s.images) for s in subjects),
        )

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Encode images.

        Args:
            images: RGB images of any size.

        Returns:
            [images, 5632]: SigLIP2's pooled embedding, then DINOv3's class token.
        """
        squares = [crop_center_square(image, IMAGE_SIZE) for image in images]
        return torch.cat([self.siglip.encode(squares), self.dinov3.encode(squares)], -1)

    @torch.no_grad()
    @override
    def generate_from_features(
        self, features: StyleFeatures, sampling: LoraSampling | None = None
    ) -> LoraWeights:
        """Decode the LoRAs, of rank 4 per image; ``sampling`` is ignored."""
        return LoraWeights.stack(
            [
                decode_i2l(self.config, self.files.read, embeddings, self.facts.base)
                for embeddings in features.embeddings
            ]
        )

    @override
    def list_warnings(self, features: StyleFeatures) -> list[tuple[str, ...]]:
        """Warn of images that are smaller than what the encoders see."""
        return [
            (f"an image is only {side} pixels on its shorter side: the LoRA copies its blur",)
            if side < _MIN_SIDE
            else ()
            for side in features.min_sides
        ]

    @override
    def compute_fingerprint(self) -> str:
        """Hash names, shapes and the first row of every tensor of all three files."""
        hasher = hashlib.sha256()
        for path in self._paths:
            with TensorFiles([path]) as files:
                for name, shape in sorted(files.shapes.items()):
                    hasher.update(f"{name} {shape}".encode())
                    hasher.update(files.read_first_row(name))
        return hasher.hexdigest()[:16]


def _check_inputs(config: I2lConfig, variant: str) -> None:
    """Raise ``InvalidArgumentError`` for a decoder that reads tokens of a language model."""
    if config.num_tokens:
        raise InvalidArgumentError(
            f"the i2L variant {variant!r} also reads images by Qwen2.5-VL, which is not supported: "
            "use the variant 'style'"
        )
