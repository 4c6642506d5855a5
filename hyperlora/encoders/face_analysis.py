"""Faces through insightface (extra ``face``): found, aligned and told apart by any pack of ONNX models.

The code is MIT; the packs that insightface downloads are for non-commercial research only, so none comes with this
project and the licence of the pack in use is recorded in what is made with it.
"""

import json
import os
import shutil
import warnings
from dataclasses import dataclass
from math import atan2, degrees, hypot
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from hyperlora.errors import BadArtifact, BadImage, BadRequest

UNKNOWN_LICENCE = "unknown; packs that insightface downloads are for non-commercial research only"
_PACKED: Final = frozenset({".onnx", ".json", ".license", ".txt", ".md"})
"""Files that belong to a pack."""


@dataclass(frozen=True)
class Face:
    """``box`` (left, top, right, bottom) in pixels, ``keypoints`` [5, 2] (eyes, nose, corners of the mouth) and
    ``embedding`` [width] of unit length where the pack has a recogniser."""

    box: tuple[float, float, float, float]
    score: float
    keypoints: np.ndarray
    embedding: np.ndarray | None = None

    @property
    def area(self) -> float:
        left, top, right, bottom = self.box
        return max(0.0, right - left) * max(0.0, bottom - top)

    def square(self, margin: float = 1.8) -> tuple[float, float, float, float]:
        """Centre x, y, side and angle (degrees, counter-clockwise) of the upright square around the face: ``margin``
        times ArcFace's aligned crop (112 pixels a side), which holds little more than eyes and mouth."""
        from insightface.utils.face_align import estimate_norm

        matrix = np.asarray(estimate_norm(self.keypoints.astype(np.float32), 112))  # pixels to the crop
        scale = hypot(matrix[0, 0], matrix[1, 0])
        angle = degrees(atan2(matrix[1, 0], matrix[0, 0]))
        x, y = np.linalg.solve(matrix[:, :2], np.array([56.0, 56.0]) - matrix[:, 2])
        return float(x), float(y), 112 / scale * margin, angle


class FaceFinder:
    """insightface's ``FaceAnalysis`` over a pack: a folder of ONNX models, or a name it knows and has on disk.

    ``size`` is the side that pictures are scaled to before faces are looked for. A folder whose ``manifest.json``
    (version 2) pins the SHA-256 of its files is checked by insightface. Raises ``BadRequest`` without the extra,
    ``BadArtifact`` for a pack that is missing, tampered with or without a detector.
    """

    def __init__(self, pack: str | os.PathLike[str], size: int = 640) -> None:
        try:
            from insightface.app import FaceAnalysis
        except ImportError as error:
            raise BadRequest("faces need the extra: pip install 'hyperlora[face]'") from error
        self.pack = str(pack)
        self.folder = _folder(self.pack)
        self.licence = _licence(self.folder)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"insightface\.")  # its use of scikit-image
        try:
            self._analysis: Any = FaceAnalysis(name=str(self.folder), providers=["CPUExecutionProvider"])
            self._analysis.prepare(ctx_id=-1, det_size=(size, size))
        except AssertionError as error:
            raise BadArtifact(f"the face pack {self.pack!r} has no detector: add one (det_*.onnx)") from error
        except Exception as error:  # onnxruntime raises kinds of its own
            raise BadArtifact(
                f"the face pack {self.pack!r} is damaged or tampered with ({_first(error)}): fetch it again"
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> "FaceFinder":
        """Itself: nothing in it changes, and its sessions cannot be copied."""
        return self

    def copy_to(self, folder: Path) -> None:
        """Copy the pack: models, manifest and licence."""
        if folder.resolve() == self.folder:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.folder.iterdir():
            if file.suffix.lower() in _PACKED:
                shutil.copyfile(file, folder / file.name)

    def faces(self, image: Image.Image) -> list[Face]:
        """All faces of an RGB image, the largest first."""
        bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
        found = [_face(face) for face in self._analysis.get(bgr) if face.kps is not None]
        return sorted(found, key=lambda face: -face.area)

    def face(self, image: Image.Image, which: int = 0) -> Face:
        """One face, by size from the largest (0). Raises ``BadImage`` if there are not so many."""
        found = self.faces(image)
        if not found:
            raise BadImage("no face was found: use a photo that shows one from the front, or another crop")
        if which >= len(found):
            raise BadImage(f"face {which} was asked for, there are {len(found)} (0 is the largest)")
        return found[which]


def _face(face: Any) -> Face:
    left, top, right, bottom = (float(v) for v in face.bbox)
    embedding = getattr(face, "normed_embedding", None)
    return Face((left, top, right, bottom), float(face.det_score), np.asarray(face.kps, float), embedding)


def _folder(pack: str) -> Path:
    home = Path(os.environ.get("INSIGHTFACE_HOME", "~/.insightface")).expanduser() / "models"
    for folder in (Path(pack), home / pack):
        if folder.is_dir():
            return folder.resolve()
    raise BadArtifact(f"there is no face pack {pack!r}: give a folder of ONNX models, or the name of one in {home}")


def _licence(folder: Path) -> str:
    """The first line of the licence file that the pack's manifest (version 2) names."""
    if not any(folder.glob("**/*.onnx")):
        raise BadArtifact(f"{str(folder)!r} holds no ONNX model: a detector and a recogniser are expected")
    try:
        name = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["license"]
        lines = (folder / Path(name).name).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError, KeyError, TypeError):
        return UNKNOWN_LICENCE
    return next((line.strip() for line in lines if line.strip()), UNKNOWN_LICENCE)


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
