"""Pictures to learn faces from: portraits composed to scenes, and faces set upright as insightface does."""

from typing import Any, Final

import lightning as L
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_builder.avatars import vocabulary as words
from data_builder.avatars.identity import AvatarIdentity
from data_builder.avatars.landmarks import Landmarks, compute_landmarks
from data_builder.avatars.portrait_dataset import PortraitDataset
from data_builder.avatars.vocabulary import GEOMETRY
from hyperlora.errors import InvalidArgumentError
from hyperlora.training.modules.face import AMBIGUOUS, FACE

MAX_FACES: Final = 2
"""Faces of a scene."""
_SIDE_RANGE: Final = (0.22, 3.2)
"""Sides of portraits from the least to the largest, in sides of the scene: too large is seen too, and is no face."""


class _FaceSceneDataset(Dataset[dict[str, Tensor]]):
    """Portraits on canvases of ``size`` pixels, one for each portrait of the folder, made anew each time unless
    ``deterministic``."""

    def __init__(self, folder: str, size: int, deterministic: bool) -> None:
        self.portraits, self.size, self.deterministic = PortraitDataset(folder), size, deterministic

    def __len__(self) -> int:
        return len(self.portraits)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng(index if self.deterministic else int(torch.randint(2**62, ())))
        canvas = generate_background(rng, self.size)
        face_kinds, faces = (
            np.zeros(MAX_FACES, np.int64),
            [Landmarks(np.zeros((5, 2)), np.zeros(4))] * MAX_FACES,
        )
        num_faces = int(rng.choice(3, p=(0.2, 0.5, 0.3)))
        for k in range(max(num_faces, int(rng.random() < 0.5))):
            portrait_index = index if k == 0 else int(rng.integers(len(self)))
            faces[k], region = self._paste_portrait(
                canvas, portrait_index, rng, with_face=k < num_faces
            )
            face_kinds[:k] = [
                AMBIGUOUS if _compute_overlap(faces[j].box, region) > 0.05 else face_kinds[j]
                for j in range(k)
            ]
            fully_visible = (
                _compute_overlap(faces[k].box, np.array([0, 0, self.size, self.size])) > 0.97
            )
            face_kinds[k] = (FACE if fully_visible else AMBIGUOUS) if k < num_faces else 0
        return {
            "images": convert_to_tensor(np.asarray(canvas)),
            "boxes": torch.from_numpy(np.stack([face.box for face in faces])).float(),
            "keypoints": torch.from_numpy(np.stack([face.keypoints for face in faces])).float(),
            "kinds": torch.from_numpy(face_kinds),
        }

    def _paste_portrait(
        self, canvas: Image.Image, index: int, rng: np.random.Generator, with_face: bool
    ) -> tuple[Landmarks, np.ndarray]:
        """A portrait somewhere on the canvas (without its face unless ``with_face``), where its face is now, and the
        square that it covers."""
        portraits = self.portraits
        image = Image.fromarray(np.array(portraits.images[index]))
        face = compute_landmarks(
            portraits.get_identity(index), portraits.get_scene(index), image.width
        )
        if not with_face:
            image = remove_face(image, face, rng)
        side = (
            self.size
            if rng.random() < 0.25
            else int(np.exp(rng.uniform(*np.log(_SIDE_RANGE) + np.log(self.size))))
        )
        scale = side / image.width
        face_center = (face.box[:2] + face.box[2:]) / 2 * scale
        half_size = (face.box[2:] - face.box[:2]) / 2 * scale
        target_center = rng.uniform(
            np.minimum(half_size, self.size / 2), np.maximum(self.size - half_size, self.size / 2)
        )
        corner = np.zeros(2) if side == self.size else np.round(target_center - face_center)
        resampling = Image.Resampling(
            int(rng.choice([Image.Resampling.BILINEAR, Image.Resampling.BICUBIC]))
        )
        canvas.paste(image.resize((side, side), resampling), (int(corner[0]), int(corner[1])))
        face_on_canvas = Landmarks(
            face.keypoints * scale + corner, face.box * scale + np.tile(corner, 2)
        )
        return face_on_canvas, np.concatenate([corner, corner + side])


class FaceDetectionDataModule(L.LightningDataModule):
    """Scenes of none, one or two portraits of any scale, and of portraits whose face is hidden: for a detector."""

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

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        data = _FaceSceneDataset(self.hparams["folder"], self.hparams["size"], deterministic=False)
        return DataLoader(data, self.hparams["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        data = _FaceSceneDataset(
            self.hparams["validation"], self.hparams["size"], deterministic=True
        )
        subset = torch.utils.data.Subset(
            data, range(0, len(data), max(1, len(data) // self.hparams["num_val_images"]))
        )
        return DataLoader(subset, 32)


class _AlignedFaceDataset(Dataset[dict[str, Any]]):
    """Faces set upright by their keypoints, which are off by ``keypoint_noise`` of the face's side, as those of a detector are."""

    def __init__(self, folder: str, keypoint_noise: float) -> None:
        self.portraits, self.keypoint_noise = PortraitDataset(folder), keypoint_noise

    def __len__(self) -> int:
        return len(self.portraits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = np.array(self.portraits.images[index])
        face = compute_landmarks(
            self.portraits.get_identity(index), self.portraits.get_scene(index), len(image)
        )
        shift = torch.randn(5, 2).numpy() * self.keypoint_noise * (face.box[2] - face.box[0])
        return {
            "faces": convert_to_tensor(align_face(image, face.keypoints + shift)),
            "subject": index // self.portraits.config.portraits_per_identity,
        }


class FaceRecognitionDataModule(L.LightningDataModule):
    """Aligned faces, who they are, and the traits of those people and of ``num_negatives`` of training: for a recogniser."""

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
        portraits = PortraitDataset(self.hparams["folder"])
        portraits_per_identity, config = portraits.config.portraits_per_identity, portraits.config
        self.identity_vectors = torch.stack(
            [
                compute_identity_vector(portraits.get_identity(i * portraits_per_identity))
                for i in range(config.num_identities)
            ]
        )

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        data = _AlignedFaceDataset(self.hparams["folder"], self.hparams["keypoint_noise"])
        return DataLoader(data, self.hparams["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(_AlignedFaceDataset(self.hparams["validation"], 0.0), 128)

    def on_after_batch_transfer(
        self, batch: dict[str, Tensor], dataloader_idx: int
    ) -> dict[str, Tensor]:
        if self.trainer is None or not self.trainer.training:
            return batch
        present, subject = batch["subject"].cpu().unique(return_inverse=True)
        is_absent = torch.ones(len(self.identity_vectors), dtype=torch.bool)
        is_absent[present] = False
        permutation = torch.randperm(len(self.identity_vectors))
        identities = torch.cat(
            [present, permutation[is_absent[permutation]][: self.hparams["num_negatives"]]]
        )
        device = batch["faces"].device
        return batch | {
            "subject": subject.to(device),
            "traits": self.identity_vectors[identities].to(device),
        }


def compute_identity_vector(person: AvatarIdentity) -> Tensor:
    """Who is drawn, as numbers of about unit size: what is named, one of each kind, colours and geometry."""
    categories = {
        "hair": words.HAIR,
        "facial_hair": words.FACIAL_HAIR,
        "nose": words.NOSE,
        "eyebrows": words.EYEBROWS,
    }
    one_hot = [
        float(getattr(person, kind) == name) for kind, names in categories.items() for name in names
    ]
    has_beard = person.facial_hair != "none"
    colors = [
        *person.hair_rgb,
        *person.skin_rgb,
        *(person.facial_hair_rgb if has_beard else (128,) * 3),
    ]
    geometry = [(getattr(person, name) - 1) * 8 for name in GEOMETRY]
    return torch.tensor([*one_hot, *((value - 128) / 64 for value in colors), *geometry])


IDENTITY_VECTOR_SIZE: Final = (
    len(words.HAIR)
    + len(words.FACIAL_HAIR)
    + len(words.NOSE)
    + len(words.EYEBROWS)
    + 9
    + len(GEOMETRY)
)


def align_face(image: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
    """The face upright as insightface shows it to a recogniser, [112, 112, 3], of pixels [h, w, 3]."""
    try:
        from insightface.utils.face_align import norm_crop
    except ImportError as error:
        raise InvalidArgumentError("faces need the extra: pip install 'hyperlora[face]'") from error
    crop: np.ndarray = norm_crop(image, keypoints.astype(np.float32), 112)
    return crop


def convert_to_tensor(image: np.ndarray) -> Tensor:
    """[h, w, 3] to [3, h, w] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)


def generate_background(rng: np.random.Generator, size: int) -> Image.Image:
    """A picture of nobody: plain, noise, tiles or a gradient, often with shapes on it."""
    cells = int(rng.choice([1, 1, 2, 4, 8, size]))
    small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
    resampling = Image.Resampling.NEAREST if rng.random() < 0.5 else Image.Resampling.BILINEAR
    canvas = small.resize((size, size), resampling)
    if rng.random() < 0.1:
        canvas.paste(
            "black", (0, 0, size, size)
        )  # where a picture is not square, insightface pads it
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(12)) if rng.random() < 0.6 else 0):
        x, y = rng.uniform(0, size, 2)
        w, h = size * rng.uniform(0.02, 0.5, 2)
        shape = draw.ellipse if rng.random() < 0.6 else draw.rectangle
        shape((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=_sample_color(rng))
    return canvas


def remove_face(portrait: Image.Image, face: Landmarks, rng: np.random.Generator) -> Image.Image:
    """The portrait with its face painted over, blurred away, or cut to pieces."""
    match int(rng.integers(4)):
        case 0 | 1:
            covered = portrait.copy()
            draw = ImageDraw.Draw(covered)
            fill = portrait.getpixel((int(face.box[0] + face.box[2]) // 2, int(face.box[3]) - 2))
            shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
            shape(tuple(face.box), fill=fill if rng.random() < 0.6 else _sample_color(rng))
            return covered
        case 2:
            return portrait.filter(ImageFilter.GaussianBlur(portrait.width / 8))
        case _:
            tile = portrait.width // 4
            tiles = (
                np.asarray(portrait)[: 4 * tile, : 4 * tile]
                .reshape(4, tile, 4, tile, 3)
                .swapaxes(1, 2)
            )
            shuffled_tiles = tiles.reshape(16, tile, tile, 3)[rng.permutation(16)].reshape(
                4, 4, tile, tile, 3
            )
            return Image.fromarray(
                np.ascontiguousarray(shuffled_tiles.swapaxes(1, 2)).reshape(4 * tile, 4 * tile, 3)
            )


def _sample_color(rng: np.random.Generator) -> tuple[int, int, int]:
    r, g, b = (int(value) for value in rng.integers(0, 256, 3))
    return r, g, b


def _compute_overlap(box: np.ndarray, region: np.ndarray) -> float:
    """How much of ``box`` lies in ``region`` (both left, top, right, bottom)."""
    intersection = np.maximum(
        0, np.minimum(box[2:], region[2:]) - np.maximum(box[:2], region[:2])
    ).prod()
    return float(intersection / np.maximum(1e-6, (box[2:] - box[:2]).prod()))
