"""One face of a photo with 106 landmarks and its embedding, by the pack *antelopev2*.

This needs the extra ``face``. The pack is for non-commercial research only, so it is not included.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from hyperlora.encoders.face_analysis import find_pack_dir
from hyperlora.encoders.face_crops import ignore_insightface_warnings, pad_with_gray
from hyperlora.errors import InvalidArgumentError, InvalidImageError, ModelLoadError, format_reason

PACK_NAME: Final = "antelopev2"
PACK_FILES: Final = ("scrfd_10g_bnkps.onnx", "2d106det.onnx", "glintr100.onnx")
"""Detector, landmarks and recognizer of the pack; its other files are not used."""
DETECTION_SIZES: Final = (640, 512, 384, 256)
"""Pixels per side at which faces are looked for, until there is one."""
MIN_FACE_SIZE: Final = 80
"""Pixels of the longer side of a face below which its identity cannot be seen."""
_DETECTION_THRESHOLD: Final = 0.5
_PROFILE_MARGIN: Final = 0.05
"""The nose of a face in profile is outside of the eyes, but for this part of their distance."""
_OTHER_PACKS: Final = {
    "w600k_r50.onnx": "buffalo_l or buffalo_m",
    "w600k_mbf.onnx": "buffalo_s or buffalo_sc",
    "det_10g.onnx": "buffalo_l",
    "det_2.5g.onnx": "buffalo_m",
    "det_500m.onnx": "buffalo_s or buffalo_sc",
}
"""Files of other packs of insightface, which people use by mistake."""


@dataclass(frozen=True)
class FoundFace:
    """The face of a photo that counts.

    Attributes:
        photo: The photo, or the photo with a gray border; coordinates are those of this image.
        landmarks: x and y in pixels, [106, 2].
        num_faces: Faces in the photo.
        position: Where the face is, for people, e.g. ``left``.
    """

    photo: Image.Image
    landmarks: np.ndarray
    num_faces: int
    position: str


class FaceFinder:
    """Detector, landmarks and recognizer of *antelopev2*.

    Args:
        pack: A folder of ONNX models, or the name of a pack in insightface's own folder.
        is_offline: Whether a missing pack is not fetched.

    Raises:
        InvalidArgumentError: insightface is not installed.
        ModelLoadError: The pack is missing, damaged or another one.
    """

    def __init__(self, pack: str = PACK_NAME, is_offline: bool = False) -> None:
        try:
            from insightface.model_zoo import get_model
        except ImportError as error:
            raise InvalidArgumentError(
                "photos of people need the extra: pip install 'hyperlora[face]'"
            ) from error
        ignore_insightface_warnings()
        paths = find_pack_files(pack, is_offline)
        try:
            networks = [get_model(str(path), providers=["CPUExecutionProvider"]) for path in paths]
            self._detector, self._landmarker, self._recognizer = networks
            self._detector.prepare(
                -1, input_size=(DETECTION_SIZES[0],) * 2, det_thresh=_DETECTION_THRESHOLD
            )
            task_names = tuple(network.taskname for network in networks)
        except Exception as error:  # onnxruntime has exceptions of its own
            raise ModelLoadError(
                f"the face pack {pack!r} is damaged ({format_reason(error, 100)}): fetch it again"
            ) from error
        if task_names != ("detection", "landmark_2d_106", "recognition"):
            raise ModelLoadError(
                f"the face pack {pack!r} has other networks under the names of {PACK_NAME} "
                f"({', '.join(task_names)}): fetch {PACK_NAME} again"
            )

    def find_face(self, photo: Image.Image) -> FoundFace:
        """Find the face that the detector is surest of, also where it fills the photo.

        Args:
            photo: RGB, of any size.

        Returns:
            The face.

        Raises:
            InvalidImageError: There is none, or it is too small or in profile.
        """
        for image in (photo, pad_with_gray(photo)):
            # RGB, as the authors of HyperLoRA give it
            pixels = np.ascontiguousarray(np.asarray(image.convert("RGB")))
            boxes, keypoints = self._detect(pixels, DETECTION_SIZES)
            if len(boxes):
                break
        else:
            raise InvalidImageError(
                "no face was found: use a photograph of a person that shows the face from the front"
            )
        size = float(max(boxes[0, 2] - boxes[0, 0], boxes[0, 3] - boxes[0, 1]))
        if size < MIN_FACE_SIZE:
            raise InvalidImageError(
                f"the face is {size:.0f} pixels high, at least {MIN_FACE_SIZE} are needed: "
                "use a larger photo, or one from nearer"
            )
        if _is_profile(keypoints[0]):
            raise InvalidImageError(
                "the face is in profile: use a photo that shows both eyes and the nose between them"
            )
        face = self._make_face(boxes[0], keypoints[0])
        landmarks = np.asarray(self._landmarker.get(pixels, face))
        center = float(boxes[0, 0] + boxes[0, 2]) / 2 / image.width
        position = ("left", "middle", "right")[min(2, max(0, int(3 * center)))]
        return FoundFace(image, landmarks, len(boxes), position)

    def embed_face(self, crop: Image.Image) -> np.ndarray:
        """Detect a face again in its crop, and embed it.

        Args:
            crop: What ``face_crops.crop_for_arcface`` returns.

        Returns:
            [512] of unit length.

        Raises:
            InvalidImageError: The face is not found again.
        """
        for image in (crop, pad_with_gray(crop)):
            pixels = np.ascontiguousarray(np.asarray(image.convert("RGB")))
            boxes, keypoints = self._detect(pixels, DETECTION_SIZES)
            if len(boxes):
                face = self._make_face(boxes[0], keypoints[0])
                self._recognizer.get(pixels, face)
                return np.asarray(face.normed_embedding)
        raise InvalidImageError("the face is too unclear to be recognized: use a sharper photo")

    def _detect(self, pixels: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [n, 5] with scores and keypoints [n, 5, 2], the surest first."""
        for size in sizes:
            boxes, keypoints = self._detector.detect(pixels, input_size=(size, size))
            if len(boxes) and keypoints is not None:
                return boxes, keypoints
        return np.empty((0, 5)), np.empty((0, 5, 2))

    @staticmethod
    def _make_face(box: np.ndarray, keypoints: np.ndarray) -> Any:  # noqa: ANN401 - an extra's
        from insightface.app.common import Face

        return Face(bbox=box[:4], kps=keypoints, det_score=box[4])


def find_pack_files(pack: str, is_offline: bool = False) -> tuple[Path, ...]:
    """Find the files of *antelopev2*; insightface fetches them once.

    Args:
        pack: A folder of ONNX models, or the name of a pack in insightface's own folder. The folder
            inside a folder that its archive unpacks to counts too.
        is_offline: Whether nothing is fetched.

    Returns:
        Detector, landmarks and recognizer.

    Raises:
        ModelLoadError: The pack is missing, incomplete or another one.
    """
    try:
        outer_dir = find_pack_dir(pack)
    except ModelLoadError:
        if pack != PACK_NAME:
            raise
        outer_dir = _fetch_pack(is_offline)
    pack_dir = outer_dir / outer_dir.name if (outer_dir / outer_dir.name).is_dir() else outer_dir
    paths = tuple(pack_dir / name for name in PACK_FILES)
    missing = [path.name for path in paths if not path.is_file()]
    if not missing:
        return paths
    names = (path.name for path in sorted(pack_dir.glob("*.onnx")))
    other = next((_OTHER_PACKS[name] for name in names if name in _OTHER_PACKS), None)
    if other is not None:
        raise ModelLoadError(
            f"{str(pack_dir)!r} is the face pack {other}, which gives another person: "
            f"{PACK_NAME} is needed"
        )
    raise ModelLoadError(
        f"the face pack in {str(pack_dir)!r} lacks {', '.join(missing)}: fetch {PACK_NAME} again"
    )


def _fetch_pack(is_offline: bool) -> Path:
    """Fetch the pack into insightface's own folder, by insightface."""
    root = Path(os.environ.get("INSIGHTFACE_HOME", "~/.insightface")).expanduser()
    sentence = (
        f"the face pack {PACK_NAME} is not in {root / 'models'}: unpack {PACK_NAME}.zip of "
        "insightface's releases there (for non-commercial research only), or give --face-pack"
    )
    if is_offline:
        raise ModelLoadError(sentence)
    from insightface.utils.storage import ensure_available

    try:
        with redirect_stdout(sys.stderr):
            return Path(ensure_available("models", PACK_NAME, root=str(root)))
    except Exception as error:  # whatever the download raises
        raise ModelLoadError(sentence) from error


def _is_profile(keypoints: np.ndarray) -> bool:
    """Whether the nose does not lie between the eyes, along their line. Keypoints [5, 2]."""
    left_eye, right_eye, nose = keypoints[:3].astype(float)
    axis = right_eye - left_eye
    squared_distance = float(axis @ axis)
    if squared_distance == 0:
        return True
    fraction = float((nose - left_eye) @ axis) / squared_distance
    return not _PROFILE_MARGIN <= fraction <= 1 - _PROFILE_MARGIN
