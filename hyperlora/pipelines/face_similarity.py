"""``FaceSimilarity``: how similar the faces in generated images are to those in photos."""

import os
from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

from hyperlora.data.images import to_image
from hyperlora.encoders.face_analysis import FaceAnalyzer, round_det_size
from hyperlora.errors import InvalidImageError, ModelLoadError

_MAX_IMAGE_SIZE: Final = 640
"""Largest side in pixels that detectors of face packs are made for."""


@dataclass(frozen=True)
class FaceSimilarity:
    """The cosine of face embeddings, by an insightface pack.

    Attributes:
        analyzer: The detector and the recognizer.
        image_size: Height and width in pixels of the images.
    """

    analyzer: FaceAnalyzer
    image_size: int

    @classmethod
    def from_pack(cls, pack: str | os.PathLike[str], image_size: int) -> Self:
        """Load a face pack.

        Args:
            pack: A folder, or the name of a pack in insightface's own folder.
            image_size: Side in pixels of the images that are generated.

        Raises:
            ModelLoadError: There is no such pack.
            InvalidArgumentError: insightface is not installed.
        """
        det_size = round_det_size(min(image_size, _MAX_IMAGE_SIZE))
        return cls(FaceAnalyzer(pack, det_size), det_size)

    def __call__(self, photos: Tensor, images: Tensor) -> Tensor:
        """Score images against the photos of one subject.

        Args:
            photos: [views, 3, height, width] in [0, 1].
            images: [n, 3, height, width] in [0, 1].

        Returns:
            Mean cosine of each image to the photos that show a face, [n], from -1 to 1; -1 for an
            image without a face.

        Raises:
            InvalidImageError: No photo shows a face.
            ModelLoadError: The pack has no recognizer.
        """
        photo_embeds = [embed for photo in photos if (embed := self._embed(photo)) is not None]
        if not photo_embeds:
            raise InvalidImageError(
                "no face was found in the photos, which the face pack is to compare: use photos "
                "from the front, or another --judge"
            )
        mean_embed = torch.stack(photo_embeds).mean(0)  # [width]
        image_embeds = [self._embed(image) for image in images]
        # both have unit length, so the product with the mean is the mean of the cosines
        scores = [-1.0 if embed is None else float(embed @ mean_embed) for embed in image_embeds]
        return torch.tensor(scores)

    def _embed(self, image: Tensor) -> Tensor | None:
        """Embed the largest face of an image [3, h, w]: [width] of unit length; None for none."""
        faces = self.analyzer.detect_faces(to_image(image))
        if not faces:
            return None
        if faces[0].embedding is None:
            raise ModelLoadError(
                f"the face pack {self.analyzer.pack!r} has no recognizer, which compares faces: "
                "give another pack with --judge"
            )
        return torch.as_tensor(faces[0].embedding)
