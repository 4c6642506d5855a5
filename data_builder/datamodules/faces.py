"""Data modules for the networks of a face pack: scenes with faces, and aligned faces."""

from dataclasses import replace
from typing import Final, TypedDict

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from data_builder.avatars import vocabulary
from data_builder.avatars.identity import AvatarIdentity
from data_builder.avatars.landmarks import Landmarks, compute_landmarks
from data_builder.avatars.portrait_dataset import PortraitDataset
from data_builder.datamodules.face_scenes import generate_background, remove_face
from hyperlora.data.images import array_to_tensor
from hyperlora.errors import InvalidArgumentError
from hyperlora.training.batches import FaceDetectionBatch, FaceRecognitionBatch
from hyperlora.training.modules.face import AMBIGUOUS, FACE

MAX_FACES: Final = 2
"""Largest number of faces in a scene."""
ALIGNED_FACE_SIZE: Final = 112
"""Side of an aligned face in pixels, insightface's."""
_NUM_FACES_PROBS: Final = (0.2, 0.5, 0.3)
"""Probabilities of scenes with 0, 1 and 2 faces."""
_PORTRAIT_SIDE_RANGE: Final = (0.22, 3.2)
"""Smallest and largest side of a portrait, in sides of the scene. The largest faces are too large
to be found."""
_FULL_SIZE_PROB: Final = 0.25
"""Probability of a portrait that covers the scene exactly."""
_MAX_OCCLUSION: Final = 0.05
"""Fraction of a face that another portrait may cover before it is ambiguous."""
_MIN_VISIBLE: Final = 0.97
"""Fraction of a face that must lie in the scene, or it is ambiguous."""
_GEOMETRY_SCALE: Final = 8.0
"""Brings the measures of a face, which lie near 1, to about unit variance."""
_CATEGORIES: Final = {
    "hair": vocabulary.HAIR,
    "facial_hair": vocabulary.FACIAL_HAIR,
    "nose": vocabulary.NOSE,
    "eyebrows": vocabulary.EYEBROWS,
}
"""Attributes of an identity that its vector one-hot encodes."""
IDENTITY_VECTOR_DIM: Final = (
    sum(len(names) for names in _CATEGORIES.values()) + 9 + len(vocabulary.GEOMETRY)
)
"""Length of an identity vector: categories, three RGB colors and the measures of the face."""


class _FaceSceneSample(TypedDict):
    """Fields as in ``FaceDetectionBatch``, without batch axis."""

    images: Tensor
    boxes: Tensor
    keypoints: Tensor
    face_kinds: Tensor


class _FaceSceneDataset(Dataset[_FaceSceneSample]):
    """Random scenes, one per portrait; the same every time if ``deterministic``."""

    def __init__(self, folder: str, size: int, deterministic: bool) -> None:
        self.portraits, self.size, self.deterministic = PortraitDataset(folder), size, deterministic

    def __len__(self) -> int:
        return len(self.portraits)

    def __getitem__(self, index: int) -> _FaceSceneSample:
        rng = np.random.default_rng(index if self.deterministic else int(torch.randint(2**62, ())))
        canvas = generate_background(rng, self.size)
        face_kinds = np.zeros(MAX_FACES, np.int64)
        faces = [Landmarks(np.zeros((5, 2)), np.zeros(4))] * MAX_FACES
        num_faces = int(rng.choice(MAX_FACES + 1, p=_NUM_FACES_PROBS))
        # half of the scenes without a face show a portrait whose face is removed
        for k in range(max(num_faces, int(rng.random() < 0.5))):
            portrait_index = index if k == 0 else int(rng.integers(len(self)))
            has_face = k < num_faces
            faces[k], region = self._paste_portrait(canvas, portrait_index, rng, has_face)
            for j in range(k):
                if _compute_overlap(faces[j].box, region) > _MAX_OCCLUSION:
                    face_kinds[j] = AMBIGUOUS
            visible = _compute_overlap(faces[k].box, np.array([0, 0, self.size, self.size]))
            if has_face:
                face_kinds[k] = FACE if visible > _MIN_VISIBLE else AMBIGUOUS
        return {
            "images": array_to_tensor(np.asarray(canvas)[None])[0],
            "boxes": torch.from_numpy(np.stack([face.box for face in faces])).float(),
            "keypoints": torch.from_numpy(np.stack([face.keypoints for face in faces])).float(),
            "face_kinds": torch.from_numpy(face_kinds),
        }

    def _paste_portrait(
        self, canvas: Image.Image, index: int, rng: np.random.Generator, has_face: bool
    ) -> tuple[Landmarks, np.ndarray]:
        """Paste a portrait at a random place and scale.

        Args:
            canvas: Scene to paste into.
            index: Of the portrait.
            rng: Random numbers.
            has_face: Whether its face stays.

        Returns:
            Landmarks of the face, and the square [left, top, right, bottom] that is covered.
        """
        portraits = self.portraits
        image = Image.fromarray(np.array(portraits.images[index]))
        face = compute_landmarks(
            portraits.get_identity(index), portraits.get_scene(index), image.width
        )
        if not has_face:
            image = remove_face(image, face, rng)
        if rng.random() < _FULL_SIZE_PROB:
            side = self.size
        else:
            log_range = np.log(_PORTRAIT_SIDE_RANGE) + np.log(self.size)
            side = int(np.exp(rng.uniform(*log_range)))
        scale = side / image.width
        face_center = (face.box[:2] + face.box[2:]) / 2 * scale
        half_size = (face.box[2:] - face.box[:2]) / 2 * scale
        # a face that fits lies inside the scene
        target_center = rng.uniform(
            np.minimum(half_size, self.size / 2), np.maximum(self.size - half_size, self.size / 2)
        )
        corner = np.zeros(2) if side == self.size else np.round(target_center - face_center)
        resampling = Image.Resampling(
            int(rng.choice([Image.Resampling.BILINEAR, Image.Resampling.BICUBIC]))
        )
        canvas.paste(image.resize((side, side), resampling), (int(corner[0]), int(corner[1])))
        landmarks = Landmarks(
            face.keypoints * scale + corner, face.box * scale + np.tile(corner, 2)
        )
        return landmarks, np.concatenate([corner, corner + side])


class FaceDetectionDataModule(L.LightningDataModule):
    """Load scenes of none, one or two portraits of any scale, as ``FaceDetectionBatch``.

    Some portraits have no face: it is covered, blurred or cut to pieces.

    Args:
        folder: Folder of training portraits.
        validation: Folder of validation portraits.
        batch_size: Scenes per step.
        size: Side of a scene in pixels.
        num_val_images: Number of validation scenes, spread over the portraits.
    """

    def __init__(
        self,
        folder: str,
        validation: str,
        batch_size: int = 32,
        size: int = 160,
        num_val_images: int = 512,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[_FaceSceneSample]:
        """Make the loader of shuffled training batches, without an incomplete last one."""
        data = _FaceSceneDataset(self.hparams["folder"], self.hparams["size"], deterministic=False)
        return DataLoader(
            data,
            self.hparams["batch_size"],
            shuffle=True,
            drop_last=True,
            collate_fn=FaceDetectionBatch.collate,
        )

    def val_dataloader(self) -> DataLoader[_FaceSceneSample]:
        """Make the loader of validation batches."""
        h = self.hparams
        data = _FaceSceneDataset(h["validation"], h["size"], deterministic=True)
        step = max(1, len(data) // h["num_val_images"])
        subset = Subset(data, range(0, len(data), step))
        return DataLoader(subset, 32, collate_fn=FaceDetectionBatch.collate)


class _AlignedFaceSample(TypedDict):
    """Fields as in ``FaceRecognitionBatch``, without batch axis."""

    faces: Tensor
    subject_ids: int


class _AlignedFaceDataset(Dataset[_AlignedFaceSample]):
    """Faces aligned by noisy keypoints; ``keypoint_noise`` is in sides of the face."""

    def __init__(self, folder: str, keypoint_noise: float) -> None:
        self.portraits, self.keypoint_noise = PortraitDataset(folder), keypoint_noise

    def __len__(self) -> int:
        return len(self.portraits)

    def __getitem__(self, index: int) -> _AlignedFaceSample:
        image = np.array(self.portraits.images[index])
        face = compute_landmarks(
            self.portraits.get_identity(index), self.portraits.get_scene(index), len(image)
        )
        face_width = face.box[2] - face.box[0]
        noise = torch.randn(5, 2).numpy() * self.keypoint_noise * face_width
        return {
            "faces": array_to_tensor(align_face(image, face.keypoints + noise)[None])[0],
            "subject_ids": index // self.portraits.config.portraits_per_identity,
        }


class FaceRecognitionDataModule(L.LightningDataModule):
    """Load aligned faces with the identity vectors of a softmax, as ``FaceRecognitionBatch``.

    The softmax of a step is over the identities of its batch and ``num_negatives`` others.

    Args:
        folder: Folder of training portraits.
        validation: Folder of validation portraits.
        batch_size: Faces per step.
        num_negatives: Other identities of training per step.
        keypoint_noise: Standard deviation of keypoints in training, in sides of the face.
    """

    def __init__(
        self,
        folder: str,
        validation: str,
        batch_size: int = 64,
        num_negatives: int = 2048,
        keypoint_noise: float = 0.02,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Compute the identity vectors [num_identities, vector_dim] of all training identities."""
        portraits = PortraitDataset(self.hparams["folder"])
        config = portraits.config
        self.identity_vectors = torch.stack(
            [
                compute_identity_vector(portraits.get_identity(i * config.portraits_per_identity))
                for i in range(config.num_identities)
            ]
        )

    def train_dataloader(self) -> DataLoader[_AlignedFaceSample]:
        """Make the loader of shuffled training batches, without an incomplete last one."""
        data = _AlignedFaceDataset(self.hparams["folder"], self.hparams["keypoint_noise"])
        return DataLoader(
            data,
            self.hparams["batch_size"],
            shuffle=True,
            drop_last=True,
            collate_fn=FaceRecognitionBatch.collate,
        )

    def val_dataloader(self) -> DataLoader[_AlignedFaceSample]:
        """Make the loader of validation batches, with exact keypoints."""
        data = _AlignedFaceDataset(self.hparams["validation"], 0.0)
        return DataLoader(data, 128, collate_fn=FaceRecognitionBatch.collate)

    def on_after_batch_transfer(
        self, batch: FaceRecognitionBatch, dataloader_idx: int
    ) -> FaceRecognitionBatch:
        """Add the identity vectors to a training batch and renumber its subjects by their rows.

        Args:
            batch: Faces with the ids of their subjects.
            dataloader_idx: Not used.

        Returns:
            The batch; in validation as it was.
        """
        if self.trainer is None or not self.trainer.training:
            return batch
        present_ids, rows = batch.subject_ids.cpu().unique(return_inverse=True)
        is_absent = torch.ones(len(self.identity_vectors), dtype=torch.bool)
        is_absent[present_ids] = False
        permutation = torch.randperm(len(self.identity_vectors))
        negatives = permutation[is_absent[permutation]][: self.hparams["num_negatives"]]
        device = batch.faces.device
        identity_vectors = self.identity_vectors[torch.cat([present_ids, negatives])]
        return replace(
            batch, subject_ids=rows.to(device), identity_vectors=identity_vectors.to(device)
        )


def compute_identity_vector(person: AvatarIdentity) -> Tensor:
    """Encode an identity as numbers of about unit size, [``IDENTITY_VECTOR_DIM``].

    One-hot categories, then the colors of hair, skin and facial hair (gray without one), then the
    measures of the face.
    """
    one_hot = [
        float(getattr(person, attribute) == name)
        for attribute, names in _CATEGORIES.items()
        for name in names
    ]
    facial_hair_rgb = (128,) * 3 if person.facial_hair == "none" else person.facial_hair_rgb
    rgb_values = (*person.hair_rgb, *person.skin_rgb, *facial_hair_rgb)
    colors = [(value - 128) / 64 for value in rgb_values]
    geometry = [(getattr(person, name) - 1) * _GEOMETRY_SCALE for name in vocabulary.GEOMETRY]
    return torch.tensor([*one_hot, *colors, *geometry])


def align_face(image: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
    """Align a face as insightface passes it to a recognizer.

    Args:
        image: uint8 pixels [h, w, 3].
        keypoints: (x, y) of five keypoints in pixels [5, 2].

    Returns:
        uint8 pixels [112, 112, 3].

    Raises:
        InvalidArgumentError: insightface is not installed.
    """
    try:
        from insightface.utils.face_align import norm_crop
    except ImportError as error:
        raise InvalidArgumentError("faces need the extra: pip install 'hyperlora[face]'") from error
    crop: np.ndarray = norm_crop(image, keypoints.astype(np.float32), ALIGNED_FACE_SIZE)
    return crop


def _compute_overlap(box: np.ndarray, region: np.ndarray) -> float:
    """Compute the fraction of ``box`` in ``region``, both [left, top, right, bottom]."""
    intersection_size = np.minimum(box[2:], region[2:]) - np.maximum(box[:2], region[:2])
    intersection = np.maximum(0, intersection_size).prod()
    return float(intersection / np.maximum(1e-6, (box[2:] - box[:2]).prod()))
