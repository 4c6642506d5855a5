"""Faces through insightface (extra ``get_face``): found, aligned and told apart by any pack of ONNX models.

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

from hyperlora.errors import InvalidArgumentError, InvalidImageError, ModelLoadError

UNKNOWN_LICENSE = "unknown; packs that insightface downloads are for non-commercial research only"
_PACK_SUFFIXES: Final = frozenset({".onnx", ".json", ".license", ".txt", ".md"})
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

    def compute_aligned_crop_box(self, margin: float = 1.8) -> tuple[float, float, float, float]:
        """Centre x, y, side and angle (degrees, counter-clockwise) of the upright square around the face: ``margin``
        times ArcFace's aligned crop (112 pixels a side), which holds little more than eyes and mouth."""
        from insightface.utils.face_align import estimate_norm

        matrix = np.asarray(
            estimate_norm(self.keypoints.astype(np.float32), 112)
        )  # pixels to the crop
        scale = hypot(matrix[0, 0], matrix[1, 0])
        angle = degrees(atan2(matrix[1, 0], matrix[0, 0]))
        x, y = np.linalg.solve(matrix[:, :2], np.array([56.0, 56.0]) - matrix[:, 2])
        return float(x), float(y), 112 / scale * margin, angle


class FaceAnalyzer:
    """insightface's ``FaceAnalysis`` over a pack: a folder of ONNX models, or a name it knows and has on disk.

    ``det_size`` is the side that pictures are scaled to before faces are looked for. A folder whose ``manifest.json``
    (version 2) pins the SHA-256 of its files is checked by insightface. Raises ``InvalidArgumentError`` without the extra,
    ``ModelLoadError`` for a pack that is missing, tampered with or without a detector.
    """

    def __init__(self, pack: str | os.PathLike[str], det_size: int = 640) -> None:
        try:
            from insightface.app import FaceAnalysis
        except ImportError as error:
            raise InvalidArgumentError(
                "faces need the extra: pip install 'hyperlora[face]'"
            ) from error
        self.pack = str(pack)
        self.pack_dir = _find_pack_dir(self.pack)
        self.license = _read_license(self.pack_dir)
        warnings.filterwarnings(
            "ignore", category=FutureWarning, module=r"insightface\."
        )  # its use of scikit-image
        try:
            self._analysis: Any = FaceAnalysis(
                name=str(self.pack_dir), providers=["CPUExecutionProvider"]
            )
            self._analysis.prepare(ctx_id=-1, det_size=(det_size, det_size))
        except AssertionError as error:
            raise ModelLoadError(
                f"the face pack {self.pack!r} has no detector: add one (det_*.onnx)"
            ) from error
        except Exception as error:  # onnxruntime raises kinds of its own
            raise ModelLoadError(
                f"the face pack {self.pack!r} is damaged or tampered with ({_get_first_line(error)}): fetch it again"
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> "FaceAnalyzer":
        """Itself: nothing in it changes, and its sessions cannot be copied."""
        return self

    def copy_models(self, target_dir: Path) -> None:
        """Copy the pack: models, manifest and licence."""
        if target_dir.resolve() == self.pack_dir:
            return
        target_dir.mkdir(parents=True, exist_ok=True)
        for file in self.pack_dir.iterdir():
            if file.suffix.lower() in _PACK_SUFFIXES:
                shutil.copyfile(file, target_dir / file.name)

    def detect_faces(self, image: Image.Image) -> list[Face]:
        """All faces of an RGB image, the largest first."""
        bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
        faces = [_convert_face(face) for face in self._analysis.get(bgr) if face.kps is not None]
        return sorted(faces, key=lambda face: -face.area)

    def get_face(self, image: Image.Image, index: int = 0) -> Face:
        """One face, by size from the largest (0). Raises ``InvalidImageError`` if there are not so many."""
        faces = self.detect_faces(image)
        if not faces:
            raise InvalidImageError(
                "no face was found: use a photo that shows one from the front, or another crop"
            )
        if index >= len(faces):
            raise InvalidImageError(
                f"face {index} was asked for, there are {len(faces)} (0 is the largest)"
            )
        return faces[index]


def _convert_face(face: Any) -> Face:
    left, top, right, bottom = (float(v) for v in face.bbox)
    embedding = getattr(face, "normed_embedding", None)
    return Face(
        (left, top, right, bottom), float(face.det_score), np.asarray(face.kps, float), embedding
    )


def _find_pack_dir(pack: str) -> Path:
    models_dir = Path(os.environ.get("INSIGHTFACE_HOME", "~/.insightface")).expanduser() / "models"
    for folder in (Path(pack), models_dir / pack):
        if folder.is_dir():
            return folder.resolve()
    raise ModelLoadError(
        f"there is no face pack {pack!r}: give a folder of ONNX models, or the name of one in {models_dir}"
    )


def _read_license(pack_dir: Path) -> str:
    """The first line of the licence file that the pack's manifest (version 2) names."""
    if not any(pack_dir.glob("**/*.onnx")):
        raise ModelLoadError(
            f"{str(pack_dir)!r} holds no ONNX model: a detector and a recogniser are expected"
        )
    try:
        license_file = json.loads((pack_dir / "manifest.json").read_text(encoding="utf-8"))[
            "license"
        ]
        lines = (pack_dir / Path(license_file).name).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError, KeyError, TypeError):
        return UNKNOWN_LICENSE
    return next((line.strip() for line in lines if line.strip()), UNKNOWN_LICENSE)


def _get_first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
