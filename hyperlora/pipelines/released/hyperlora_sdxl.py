"""HyperLoRA (2503.16944): the identity of a person in real photographs, as an SDXL LoRA."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import override

from hyperlora.compute import ComputeConfig
from hyperlora.encoders.clip_vision import VISION_PREFIX, ClipVisionEncoder
from hyperlora.encoders.face_crops import (
    crop_for_arcface,
    crop_for_clip,
    crop_for_training,
    remove_background,
)
from hyperlora.encoders.face_finder import PACK_NAME, FaceFinder
from hyperlora.encoders.streamed_encoder import TensorFiles
from hyperlora.errors import InvalidImageError, ModelLoadError
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.hyperlora_resampler import join_photos
from hyperlora.pipelines.config import LoraSampling
from hyperlora.pipelines.photo_model import SubjectPhotos
from hyperlora.pipelines.released.cards import ReleasedCard, find_card
from hyperlora.pipelines.released.hub_files import ReleasedFiles, open_files, read_json
from hyperlora.pipelines.released.hyperlora_files import HyperLoraFiles
from hyperlora.pipelines.released.recognize import Recognition
from hyperlora.pipelines.released.released_model import ReleasedModel, ReleasedOptions

_ENCODER_WEIGHTS: Final = "model.safetensors"


@dataclass(frozen=True)
class FaceInputs:
    """What the networks see of one photo.

    Attributes:
        clip_image: 224×224, gray where the background was.
        embedding: Of the face, [512] of unit length.
        warning: What may be wrong with the photo; empty for nothing.
    """

    clip_image: Image.Image
    embedding: np.ndarray
    warning: str


@dataclass(frozen=True)
class HyperLoraFeatures:
    """The coefficients of the bases for several subjects.

    Attributes:
        coefficients: [subjects, rows, basis size], rows of length 1.
        warnings: What may be wrong with the photos of each subject.
    """

    coefficients: Tensor
    warnings: tuple[tuple[str, ...], ...]


class HyperLoraSdxl(ReleasedModel[HyperLoraFeatures]):
    """HyperLoRA, with weights that are read from their files while they compute.

    Example: ``open_released_model("bytedance-research/HyperLoRA:edit")(["me.jpg"])``.

    Args:
        files: The four files of one variant.
        encoder: CLIP-L's vision model.
        face_finder: The face pack.
        facts: The card of the variant.
        compute: The device of the networks; None for the CPU.
        keep_background: Whether CLIP sees the background of the photos.

    Raises:
        ModelLoadError: The files do not belong together.
    """

    method: ClassVar[str] = "hyperlora-sdxl"
    file_dtype: ClassVar[torch.dtype] = torch.float16

    def __init__(
        self,
        files: HyperLoraFiles,
        encoder: ClipVisionEncoder,
        face_finder: FaceFinder,
        facts: ReleasedCard,
        compute: ComputeConfig | None = None,
        keep_background: bool = False,
    ) -> None:
        super().__init__(facts, compute)
        self.files, self.encoder, self.face_finder = files, encoder, face_finder
        self.keep_background = keep_background
        self._layout = files.make_layout(facts.base)
        self._projector, self._resampler = files.build_networks(len(files.index), self.device)
        clip_dim = self._resampler.get_parameter("proj_in_2.weight").shape[1]
        if encoder.width != clip_dim:
            raise ModelLoadError(
                f"the encoder has tokens of width {encoder.width}, {clip_dim} expected: give "
                f"{facts.list_parts('encoder')[0].name}"
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
        """Open the network; the face pack is checked before anything large is fetched."""
        facts = find_card("hyperlora-sdxl", _match_variant(recognition.variant))
        face_finder = FaceFinder(options.face_pack or PACK_NAME, options.offline)
        encoder_name = options.encoder or facts.list_parts("encoder")[0].name
        encoder_files = open_files(encoder_name, offline=options.offline)
        index_path, *tensor_paths = recognition.files
        index = read_json(files, index_path)
        for path in tensor_paths:
            files.read_header(path)  # whole, and of tensors
        config_path = encoder_files.fetch("config.json")
        encoder_path = encoder_files.fetch_tensors(_ENCODER_WEIGHTS, VISION_PREFIX)
        modules, resampler, id_projector = (files.fetch(path) for path in tensor_paths)
        device = compute.torch_device if compute else "cpu"
        return cls(
            HyperLoraFiles(index, modules, resampler, id_projector),
            ClipVisionEncoder(config_path, encoder_path, device),
            face_finder,
            facts,
            compute,
        )

    @property
    @override
    def layout(self) -> LoraLayout:
        """The layout of the LoRAs."""
        return self._layout

    @override
    def crop_for_base(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Cut photos to their faces, as the authors fine-tune; those without one are left out."""
        crops = []
        for image in images:
            try:
                face = self.face_finder.find_face(image)
            except InvalidImageError:  # of which ``encode_subjects`` warns
                continue
            border = (face.photo.width - image.width) // 2  # gray, around a face that fills it
            crops.append(crop_for_training(image, face.landmarks - border))
        return crops

    @override
    def encode_subjects(self, subjects: Sequence[SubjectPhotos]) -> HyperLoraFeatures:
        """Find the face of each photo, and compute the coefficients of each subject."""
        prepared = [self.prepare_faces(subject.images) for subject in subjects]
        faces = [face for subject_faces, _ in prepared for face in subject_faces]
        clip_tokens = self.encoder.encode_images([face.clip_image for face in faces])
        embeddings = torch.from_numpy(np.stack([face.embedding for face in faces])).float()
        coefficients = self.compute_coefficients(embeddings, clip_tokens)  # [photos, rows, K]
        parts = coefficients.split([len(subject_faces) for subject_faces, _ in prepared])
        joined = torch.stack([join_photos(part) for part in parts])
        return HyperLoraFeatures(joined, tuple(warnings for _, warnings in prepared))

    @torch.no_grad()
    def compute_coefficients(self, embeddings: Tensor, clip_tokens: Tensor) -> Tensor:
        """Run projector and resampler.

        Args:
            embeddings: Of the faces, [photos, 512] of unit length.
            clip_tokens: [photos, tokens, width].

        Returns:
            [photos, rows, basis size], not normalized.
        """
        id_tokens = self._projector(embeddings.to(self.device))
        coefficients: Tensor = self._resampler(id_tokens, clip_tokens.to(self.device))
        return coefficients

    def prepare_faces(
        self, photos: Sequence[Image.Image]
    ) -> tuple[list[FaceInputs], tuple[str, ...]]:
        """Find and cut the face of each photo of one subject.

        Args:
            photos: RGB images of any size.

        Returns:
            What the networks see of each usable photo, and a sentence for each doubt.

        Raises:
            InvalidImageError: No photo has a usable face.
        """
        faces, warnings = list[FaceInputs](), list[str]()
        for i, photo in enumerate(photos):
            prefix = f"photo {i + 1}: " if len(photos) > 1 else ""
            try:
                face = self._prepare_face(photo)
            except InvalidImageError as error:
                warnings.append(f"{prefix}{error}")
                continue
            faces.append(face)
            if face.warning:
                warnings.append(f"{prefix}{face.warning}")
        if not faces:
            raise InvalidImageError(warnings[0])
        return faces, tuple(warnings)

    def _prepare_face(self, photo: Image.Image) -> FaceInputs:
        found = self.face_finder.find_face(photo)
        embedding = self.face_finder.embed_face(crop_for_arcface(found.photo, found.landmarks))
        canvas = found.photo
        if not self.keep_background:
            canvas = remove_background(found.photo, found.landmarks)
        warning = ""
        if found.num_faces > 1:
            warning = (
                f"{found.num_faces} faces are in the photo, and the clearest ({found.position}) "
                "is used: cut the photo for another"
            )
        return FaceInputs(crop_for_clip(canvas, found.landmarks), embedding, warning)

    @override
    def generate_from_features(
        self, features: HyperLoraFeatures, sampling: LoraSampling | None = None
    ) -> LoraWeights:
        """Mix the bases, one at a time from their file; ``sampling`` is ignored."""
        return self.files.mix_bases(features.coefficients, self._layout)

    @override
    def list_warnings(self, features: HyperLoraFeatures) -> list[tuple[str, ...]]:
        """List for each subject photos that were left out, and those with several faces."""
        return list(features.warnings)

    @override
    def compute_fingerprint(self) -> str:
        """Compute a hash of the first rows of the networks' tensors."""
        hasher = hashlib.sha256(str(self.keep_background).encode())
        for path in (self.files.modules, self.files.resampler, self.files.id_projector):
            hasher.update(_sample_file(path))
        return hasher.hexdigest()


def _sample_file(path: Path) -> bytes:
    """The first row of every tensor of a file."""
    with TensorFiles([path]) as files:
        return b"".join(files.read_first_row(name) for name in sorted(files.shapes))


def _match_variant(variant: str) -> str:
    """The variant in the table; a folder of any other name counts as the first."""
    return variant if variant in ("fidelity", "edit") else ""
