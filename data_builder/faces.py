"""Crops around faces, through any insightface pack."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data_builder.plan import Square
from hyperlora.encoders.face import FaceFinder
from hyperlora.errors import BadRequest


@dataclass(frozen=True)
class FaceCrop:
    """The upright square around a face, by size from the largest (``which`` = 0)."""

    finder: FaceFinder
    which: int = 0
    margin: float = 1.8

    @property
    def notes(self) -> Mapping[str, str]:
        return {"face_pack": Path(self.finder.pack).name, "face_licence": self.finder.licence}

    def __call__(self, image: Image.Image, remarks: list[str]) -> Square:
        """Raises ``BadImage`` for a photo without that face."""
        face = self.finder.face(image, self.which)
        if self.which == 0 and (others := len(self.finder.faces(image)) - 1):
            remarks.append(f"{others + 1} faces, the largest was taken (another by --face N)")
        return face.square(self.margin)


def face_crop(pack: str | Path | None, which: int = 0, margin: float = 1.8) -> FaceCrop:
    """Raises ``BadRequest`` if no pack is named, and what ``FaceFinder`` raises."""
    if pack is None:
        raise BadRequest("--crop face needs --face-pack: a folder of ONNX models (detector and, perhaps, recogniser)")
    return FaceCrop(FaceFinder(pack), which, margin)
