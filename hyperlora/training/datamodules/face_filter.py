"""Which photos of persons are good enough, and where the face is: one face, large and sharp."""

import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from hyperlora.data.photos import Photo, SubjectPhotos
from hyperlora.errors import InvalidArgumentError, InvalidImageError
from hyperlora.training.augmentation import Box

if TYPE_CHECKING:
    from hyperlora.encoders.face_analysis import FaceAnalyzer

_OTHER_FACE_AREA: Final = 0.25
"""Area, relative to the largest face, from which another face counts as a second person."""
_SHARPNESS_SIZE: Final = 112
"""Side in pixels at which sharpness is measured, ArcFace's."""


@dataclass(frozen=True)
class FaceFilterConfig:
    """Which photos are used, and how references are cropped (extra ``face``).

    Attributes:
        pack: Folder of ONNX models, or name of a pack of insightface.
        min_face_size: Least side of the face in pixels.
        min_sharpness: Least variance of the Laplacian, in squared gray levels, of the face at 112
            pixels. A sharp face has hundreds; at 10 its edges are three pixels wide.
        max_faces: Most faces of a size that counts as another person.
        det_size: Side in pixels to which photos are resized for detection.
        crop_references: Whether references are the upright square around the face.
        crop_margin: Side of that square, in sides of ArcFace's aligned face.
    """

    pack: str
    min_face_size: int = 64
    min_sharpness: float = 10.0
    max_faces: int = 1
    det_size: int = 640
    crop_references: bool = True
    crop_margin: float = 1.8


@dataclass(frozen=True)
class FaceRecord:
    """What is known of the largest face of a photo; ``reason`` says why it is not used.

    Attributes:
        signature: Signature of the photo that was inspected.
        box: The face in pixels.
        crop: Center x and y, side and angle of the square in which it is upright.
        reason: Why the photo is left out; None if it is used.
    """

    signature: str
    box: Box | None = None
    crop: tuple[float, float, float, float] | None = None
    reason: str | None = None


class FaceIndex:
    """The faces of photos, kept on disk if there is a folder for it.

    Every process writes a file of its own and reads those of all, so several may work at once.

    Args:
        config: Which photos are good enough.
        folder: Folder of the index, created if missing; None to keep nothing.
        analyzer: Detects faces; None loads ``config.pack`` at the first photo.
    """

    def __init__(
        self,
        config: FaceFilterConfig,
        folder: Path | None = None,
        analyzer: "FaceAnalyzer | None" = None,
    ) -> None:
        self.config, self.folder, self._analyzer = config, folder, analyzer
        settings = json.dumps(asdict(replace(config, crop_references=True)), sort_keys=True)
        self._name = f"faces-{sha256(settings.encode()).hexdigest()[:12]}"
        self.records: dict[str, FaceRecord] = {}
        self.load()

    def load(self) -> None:
        """Read what this and other processes wrote; a line that was cut off is ignored."""
        if self.folder is None:
            return
        for path in sorted(self.folder.glob(f"{self._name}-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    photo_id, fields = json.loads(line)
                    self.records[photo_id] = _parse_record(fields)
                except (ValueError, TypeError, KeyError):
                    continue

    def inspect(self, photos: Iterable[tuple[str, Photo]]) -> None:
        """Inspect photos that are new, or that changed since they were inspected.

        Args:
            photos: An id and the photo.
        """
        process = f"{platform.node()}-{os.getpid()}"
        path = self.folder / f"{self._name}-{process}.jsonl" if self.folder else None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        for photo_id, photo in photos:
            if self.get(photo_id, photo) is not None:
                continue
            record = self._inspect_photo(photo)
            self.records[photo_id] = record
            if path is not None:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([photo_id, asdict(record)]) + "\n")

    def get(self, photo_id: str, photo: Photo) -> FaceRecord | None:
        """Return the record of a photo; None if it changed or was never inspected.

        Args:
            photo_id: Its id.
            photo: The photo.
        """
        record = self.records.get(photo_id)
        try:
            return record if record and record.signature == photo.signature else None
        except InvalidImageError:
            return None

    def _inspect_photo(self, photo: Photo) -> FaceRecord:
        try:
            signature, image = photo.signature, photo.read_image()
        except InvalidImageError:
            return FaceRecord("", reason="cannot be read")
        return replace(self.inspect_image(image), signature=signature)

    def inspect_image(self, image: Image.Image) -> FaceRecord:
        """Find the face of an image and check it; the signature stays empty."""
        config, analyzer = self.config, self._get_analyzer()
        faces = analyzer.detect_faces(image)
        if not faces:
            return FaceRecord("", reason="no face was found")
        face = faces[0]
        num_people = sum(f.area >= _OTHER_FACE_AREA * face.area for f in faces)
        if num_people > config.max_faces:
            return FaceRecord("", reason=f"more than {config.max_faces} face(s)")
        left, top, right, bottom = face.box
        if min(right - left, bottom - top) < config.min_face_size:
            return FaceRecord("", reason=f"the face is smaller than {config.min_face_size} pixels")
        if measure_sharpness(image, face.box) < config.min_sharpness:
            return FaceRecord("", reason="the face is not sharp")
        return FaceRecord("", face.box, face.compute_aligned_crop_box(config.crop_margin))

    def _get_analyzer(self) -> "FaceAnalyzer":
        if self._analyzer is None:
            from hyperlora.encoders.face_analysis import FaceAnalyzer

            self._analyzer = FaceAnalyzer(self.config.pack, self.config.det_size)
        return self._analyzer


def measure_sharpness(image: Image.Image, box: Box) -> float:
    """Measure the sharpness of a part of an image: the variance of the Laplacian at 112 pixels.

    Args:
        image: The image.
        box: The part in pixels; what lies outside of the image is left out.

    Returns:
        The variance in squared gray levels, 0 for a part without pixels.
    """
    left, top = max(0.0, box[0]), max(0.0, box[1])
    right, bottom = min(float(image.width), box[2]), min(float(image.height), box[3])
    if right - left < 1 or bottom - top < 1:
        return 0.0
    size = (_SHARPNESS_SIZE, _SHARPNESS_SIZE)
    part = image.convert("L").resize(size, Image.Resampling.BICUBIC, (left, top, right, bottom))
    gray = np.asarray(part, np.float32)  # [112, 112]
    center = gray[1:-1, 1:-1]
    laplacian = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:] - 4 * center
    return float(laplacian.var())


def filter_subjects(
    subjects: Sequence[SubjectPhotos], find_reason: Callable[[Photo], str | None]
) -> tuple[list[SubjectPhotos], dict[str, int]]:
    """Leave out photos, and subjects that have none left.

    Args:
        subjects: The subjects.
        find_reason: Says why a photo is left out, or returns None.

    Returns:
        The subjects that are left, and the number of photos left out by reason.

    Raises:
        InvalidArgumentError: No photo is left.
    """
    num_photos_by_reason: dict[str, int] = {}
    remaining_subjects = []
    for subject in subjects:
        photos = []
        for photo in subject.photos:
            reason = find_reason(photo)
            if reason is None:
                photos.append(photo)
            else:
                num_photos_by_reason[reason] = num_photos_by_reason.get(reason, 0) + 1
        if photos:
            remaining_subjects.append(replace(subject, photos=tuple(photos)))
    if not remaining_subjects:
        raise InvalidArgumentError(
            f"no photo is good enough ({format_counts(num_photos_by_reason)}): "
            "lower the limits of faces, or use other photos"
        )
    return remaining_subjects, num_photos_by_reason


def format_counts(num_photos_by_reason: dict[str, int]) -> str:
    """Format how many photos are left out for which reason, the most frequent first."""
    ordered = sorted(num_photos_by_reason.items(), key=lambda item: -item[1])
    return "; ".join(f"{number} because {reason}" for reason, number in ordered)


def _parse_record(fields: dict[str, object]) -> FaceRecord:
    """A record from JSON, which has lists for tuples."""
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    return FaceRecord(**values)  # type: ignore[arg-type]
