"""Face detection, alignment and recognition by insightface, with any pack of ONNX models.

This needs the extra ``face``. The code of insightface is MIT. The packs that it downloads are for
non-commercial research only, so none of them is included here. The license of the pack is recorded
in every LoRA made with it.
"""

import json
import os
import shutil
from dataclasses import dataclass
from math import atan2, degrees, hypot
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from hyperlora.encoders.face_crops import ignore_insightface_warnings
from hyperlora.errors import InvalidArgumentError, InvalidImageError, ModelLoadError
from hyperlora.pretrained import REPOSITORY_URL

if TYPE_CHECKING:
    from insightface.app.common import Face as InsightFace

UNKNOWN_LICENSE = "unknown; packs that insightface downloads are for non-commercial research only"
_PACK_SUFFIXES: Final = frozenset({".onnx", ".json", ".license", ".txt", ".md"})
"""Suffixes of the files of a pack."""
_DETECTOR_STRIDE: Final = 32
"""Face detectors take sides that are multiples of it."""
_ALIGNED_FACE_SIZE: Final = 112
"""Height and width in pixels of ArcFace's aligned faces."""


@dataclass(frozen=True)
class Face:
    """A detected face.

    Attributes:
        box: Left, top, right, bottom in pixels.
        score: Confidence of the detector in [0, 1].
        keypoints: Eyes, nose and corners of the mouth, x and y in pixels, [5, 2].
        embedding: [width] of unit length, if the pack has a recognizer.
    """

    box: tuple[float, float, float, float]
    score: float
    keypoints: np.ndarray
    embedding: np.ndarray | None = None

    @property
    def area(self) -> float:
        """Area of the box in square pixels."""
        left, top, right, bottom = self.box
        return max(0.0, right - left) * max(0.0, bottom - top)

    def compute_aligned_crop_box(self, margin: float = 1.8) -> tuple[float, float, float, float]:
        """Compute the square around the face in which it is upright.

        Args:
            margin: Side of the square, in sides of ArcFace's aligned face. At 1 the square holds
                little more than eyes and mouth.

        Returns:
            Center x and y and side in pixels, and the angle in degrees, counter-clockwise.
        """
        from insightface.utils.face_align import estimate_norm

        # similarity transform from pixels to the aligned face, [2, 3] = [s R | t]
        matrix = np.asarray(estimate_norm(self.keypoints.astype(np.float32), _ALIGNED_FACE_SIZE))
        scale = hypot(matrix[0, 0], matrix[1, 0])
        angle = degrees(atan2(matrix[1, 0], matrix[0, 0]))
        # the center c of the aligned face in pixels solves s R x + t = c
        center = np.full(2, _ALIGNED_FACE_SIZE / 2)
        x, y = np.linalg.solve(matrix[:, :2], center - matrix[:, 2])
        return float(x), float(y), _ALIGNED_FACE_SIZE / scale * margin, angle


class FaceAnalyzer:
    """insightface's ``FaceAnalysis`` with one pack.

    If ``manifest.json`` (version 2) of the pack has the SHA-256 of its files, insightface checks
    them.

    Args:
        pack: A folder of ONNX models, or the name of a pack in insightface's own folder.
        det_size: Height and width in pixels to which images are resized for detection.

    Raises:
        InvalidArgumentError: insightface is not installed.
        ModelLoadError: The pack is missing, tampered with or without a detector.
    """

    def __init__(self, pack: str | os.PathLike[str], det_size: int = 640) -> None:
        try:
            from insightface.app import FaceAnalysis
        except ImportError as error:
            raise InvalidArgumentError(
                "faces need the extra: pip install 'hyperlora[face]'"
            ) from error
        self.pack = str(pack)
        self.pack_dir = find_pack_dir(self.pack)
        self.license = _read_license(self.pack_dir)
        ignore_insightface_warnings()
        try:
            self._analysis = FaceAnalysis(
                name=str(self.pack_dir), providers=["CPUExecutionProvider"]
            )
            self._analysis.prepare(ctx_id=-1, det_size=(det_size, det_size))
        except AssertionError as error:
            raise ModelLoadError(
                f"the face pack {self.pack!r} has no detector: add one (det_*.onnx)"
            ) from error
        except Exception as error:  # onnxruntime has exceptions of its own
            raise ModelLoadError(
                f"the face pack {self.pack!r} is damaged or tampered with "
                f"({_get_first_line(error)}): fetch it again"
            ) from error

    def __deepcopy__(self, memo: dict[int, object]) -> "FaceAnalyzer":
        """Return the same object: it never changes, and its sessions cannot be copied."""
        return self

    def copy_models(self, target_dir: Path) -> None:
        """Copy the files of the pack to a folder: models, manifest and license."""
        if os.path.realpath(target_dir) == str(self.pack_dir):
            return
        target_dir.mkdir(parents=True, exist_ok=True)
        for file in self.pack_dir.iterdir():
            if file.suffix.lower() in _PACK_SUFFIXES:
                shutil.copyfile(file, target_dir / file.name)

    def detect_faces(self, image: Image.Image) -> list[Face]:
        """Detect all faces of an image, the largest first."""
        bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
        faces = [_convert_face(face) for face in self._analysis.get(bgr) if face.kps is not None]
        return sorted(faces, key=lambda face: -face.area)

    def get_face(self, image: Image.Image, index: int = 0) -> Face:
        """Detect one face.

        Args:
            image: The image.
            index: The position in the order of size; 0 is the largest face.

        Returns:
            The face.

        Raises:
            InvalidImageError: The image has not so many faces.
        """
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


def round_det_size(image_size: int) -> int:
    """Round the side of an image in pixels up to one that face detectors take."""
    return -(-image_size // _DETECTOR_STRIDE) * _DETECTOR_STRIDE


def _convert_face(face: "InsightFace") -> Face:
    """insightface's face as ``Face``."""
    left, top, right, bottom = (float(v) for v in face.bbox)
    embedding = getattr(face, "normed_embedding", None)
    return Face(
        (left, top, right, bottom), float(face.det_score), np.asarray(face.kps, float), embedding
    )


def find_pack_dir(pack: str) -> Path:
    """Find the folder of a pack, given by path or by name.

    Raises:
        ModelLoadError: There is none.
    """
    models_dir = Path(os.environ.get("INSIGHTFACE_HOME", "~/.insightface")).expanduser() / "models"
    for folder in (Path(pack), models_dir / pack):
        if folder.is_dir():
            return folder.resolve()
    raise ModelLoadError(
        f"there is no face pack {pack!r}: "
        f"give a folder of ONNX models, or the name of one in {models_dir}; "
        f"{REPOSITORY_URL} holds one for drawn faces, checkpoints/avatars/face-pack"
    )


def _read_license(pack_dir: Path) -> str:
    """The first line of the license file that the pack's manifest (version 2) names."""
    if not any(pack_dir.glob("**/*.onnx")):
        raise ModelLoadError(
            f"{str(pack_dir)!r} holds no ONNX model: a detector and a recognizer are expected"
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
    """The first line of an error's text, at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
