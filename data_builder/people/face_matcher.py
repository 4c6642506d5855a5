"""``FaceMatcher``: whether two images show the same face."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from hyperlora import pretrained
from hyperlora.diffusion.diffusion_base import get_base_id
from hyperlora.encoders.face_analysis import FaceAnalyzer
from hyperlora.errors import InvalidArgumentError, ModelLoadError

_AVATARS_ID: Final = "avatars/base"


@dataclass(frozen=True)
class FaceMatcher:
    """Embeds the largest face of images.

    Attributes:
        analyzer: Detector and recognizer.
    """

    analyzer: FaceAnalyzer

    def embed_face(self, image: Image.Image) -> np.ndarray | None:
        """Embed the largest face of an image.

        Args:
            image: RGB, of any size.

        Returns:
            [width] of unit length; None if there is no face.

        Raises:
            ModelLoadError: The pack has no recognizer.
        """
        faces = self.analyzer.detect_faces(image)
        if not faces:
            return None
        if faces[0].embedding is None:
            raise ModelLoadError(
                f"the face pack {self.analyzer.pack!r} has no recognizer, which compares faces: "
                "give another pack with --face-pack"
            )
        return faces[0].embedding


def is_avatar_base(base: str) -> bool:
    """Return whether a folder or hub id is the base of the bundle, which draws avatars."""
    return get_base_id(base) == _AVATARS_ID


def load_face_matcher(base: str, face_pack: str | None) -> FaceMatcher:
    """Load the face pack that judges the images of a base.

    Args:
        base: Folder or hub id of the base.
        face_pack: Folder or name of a pack; None for that of the bundle, for its own base.

    Returns:
        The matcher.

    Raises:
        InvalidArgumentError: The bundle's pack does not know the faces of the base, or insightface
            is not installed.
        ModelLoadError: The pack is missing or damaged.
    """
    if face_pack is None and not is_avatar_base(base):
        raise InvalidArgumentError(
            f"no face pack for the faces of base {base!r}: the bundled one knows avatars only, "
            "give one with --face-pack, e.g. buffalo_l"
        )
    return FaceMatcher(FaceAnalyzer(face_pack or str(pretrained.FACE_PACK_DIR)))
