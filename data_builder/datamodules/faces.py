"""Pictures to learn faces from: portraits composed to scenes, and faces set upright as insightface does."""

from typing import Any, Final

import lightning as L
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_builder.avatars import vocabulary as words
from data_builder.avatars.identity import Identity
from data_builder.avatars.landmarks import Landmarks, landmarks
from data_builder.avatars.portrait_dataset import Portraits
from data_builder.avatars.vocabulary import GEOMETRY
from hyperlora.errors import BadRequest
from hyperlora.training.modules.face import FACE, UNCLEAR

MOST: Final = 2
"""Faces of a scene."""
_SIDES: Final = (0.22, 3.2)
"""Sides of portraits from the least to the largest, in sides of the scene: too large is seen too, and is no face."""


class _Scenes(Dataset[dict[str, Tensor]]):
    """Portraits on canvases of ``size`` pixels, one for each portrait of the folder, made anew each time unless
    ``fixed``."""

    def __init__(self, folder: str, size: int, fixed: bool) -> None:
        self.portraits, self.size, self.fixed = Portraits(folder), size, fixed

    def __len__(self) -> int:
        return len(self.portraits)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng(index if self.fixed else int(torch.randint(2**62, ())))
        canvas = background(rng, self.size)
        kinds, faces = np.zeros(MOST, np.int64), [Landmarks(np.zeros((5, 2)), np.zeros(4))] * MOST
        count = int(rng.choice(3, p=(0.2, 0.5, 0.3)))
        for k in range(max(count, int(rng.random() < 0.5))):
            which = index if k == 0 else int(rng.integers(len(self)))
            faces[k], square = self._pasted(canvas, which, rng, wanted=k < count)
            kinds[:k] = [UNCLEAR if _shared(faces[j].box, square) > 0.05 else kinds[j] for j in range(k)]
            whole = _shared(faces[k].box, np.array([0, 0, self.size, self.size])) > 0.97
            kinds[k] = (FACE if whole else UNCLEAR) if k < count else 0
        return {
            "images": pixels(np.asarray(canvas)),
            "boxes": torch.from_numpy(np.stack([face.box for face in faces])).float(),
            "keypoints": torch.from_numpy(np.stack([face.keypoints for face in faces])).float(),
            "kinds": torch.from_numpy(kinds),
        }

    def _pasted(
        self, canvas: Image.Image, index: int, rng: np.random.Generator, wanted: bool
    ) -> tuple[Landmarks, np.ndarray]:
        """A portrait somewhere on the canvas (without its face unless ``wanted``), where its face is now, and the
        square that it covers."""
        portraits = self.portraits
        image = Image.fromarray(np.array(portraits.images[index]))
        face = landmarks(portraits.person(index), portraits.scene(index), image.width)
        if not wanted:
            image = faceless(image, face, rng)
        side = self.size if rng.random() < 0.25 else int(np.exp(rng.uniform(*np.log(_SIDES) + np.log(self.size))))
        scale = side / image.width
        middle = (face.box[:2] + face.box[2:]) / 2 * scale
        reach = (face.box[2:] - face.box[:2]) / 2 * scale
        goal = rng.uniform(np.minimum(reach, self.size / 2), np.maximum(self.size - reach, self.size / 2))
        corner = np.zeros(2) if side == self.size else np.round(goal - middle)
        how = Image.Resampling(int(rng.choice([Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])))
        canvas.paste(image.resize((side, side), how), (int(corner[0]), int(corner[1])))
        placed = Landmarks(face.keypoints * scale + corner, face.box * scale + np.tile(corner, 2))
        return placed, np.concatenate([corner, corner + side])


class FaceScenes(L.LightningDataModule):
    """Scenes of none, one or two portraits of any scale, and of portraits whose face is hidden: for a detector."""

    def __init__(self, folder: str, validation: str, batch_size: int = 32, size: int = 160, scenes: int = 512) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        data = _Scenes(self.hparams["folder"], self.hparams["size"], fixed=False)
        return DataLoader(data, self.hparams["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        data = _Scenes(self.hparams["validation"], self.hparams["size"], fixed=True)
        some = torch.utils.data.Subset(data, range(0, len(data), max(1, len(data) // self.hparams["scenes"])))
        return DataLoader(some, 32)


class _Aligned(Dataset[dict[str, Any]]):
    """Faces set upright by their keypoints, which are off by ``off`` of the face's side, as those of a detector are."""

    def __init__(self, folder: str, off: float) -> None:
        self.portraits, self.off = Portraits(folder), off

    def __len__(self) -> int:
        return len(self.portraits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = np.array(self.portraits.images[index])
        face = landmarks(self.portraits.person(index), self.portraits.scene(index), len(image))
        shift = torch.randn(5, 2).numpy() * self.off * (face.box[2] - face.box[0])
        return {
            "faces": pixels(aligned(image, face.keypoints + shift)),
            "subject": index // self.portraits.plan.each,
        }


class AlignedFaces(L.LightningDataModule):
    """Aligned faces, who they are, and the traits of those people and of ``others`` of training: for a recogniser."""

    def __init__(
        self, folder: str, validation: str, batch_size: int = 64, others: int = 2048, off: float = 0.02
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        portraits = Portraits(self.hparams["folder"])
        each, plan = portraits.plan.each, portraits.plan
        self.traits = torch.stack([traits(portraits.person(i * each)) for i in range(plan.people)])

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        data = _Aligned(self.hparams["folder"], self.hparams["off"])
        return DataLoader(data, self.hparams["batch_size"], shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(_Aligned(self.hparams["validation"], 0.0), 128)

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        if self.trainer is None or not self.trainer.training:
            return batch
        present, subject = batch["subject"].cpu().unique(return_inverse=True)
        absent = torch.ones(len(self.traits), dtype=torch.bool)
        absent[present] = False
        drawn = torch.randperm(len(self.traits))
        chosen = torch.cat([present, drawn[absent[drawn]][: self.hparams["others"]]])
        device = batch["faces"].device
        return batch | {"subject": subject.to(device), "traits": self.traits[chosen].to(device)}


def traits(person: Identity) -> Tensor:
    """Who is drawn, as numbers of about unit size: what is named, one of each kind, colours and geometry."""
    kinds = {"hair": words.HAIR, "facial_hair": words.FACIAL_HAIR, "nose": words.NOSE, "eyebrows": words.EYEBROWS}
    named = [float(getattr(person, kind) == name) for kind, names in kinds.items() for name in names]
    bearded = person.facial_hair != "none"
    colours = [*person.hair_rgb, *person.skin_rgb, *(person.facial_hair_rgb if bearded else (128,) * 3)]
    geometry = [(getattr(person, name) - 1) * 8 for name in GEOMETRY]
    return torch.tensor([*named, *((value - 128) / 64 for value in colours), *geometry])


TRAITS: Final = len(words.HAIR) + len(words.FACIAL_HAIR) + len(words.NOSE) + len(words.EYEBROWS) + 9 + len(GEOMETRY)


def aligned(image: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
    """The face upright as insightface shows it to a recogniser, [112, 112, 3], of pixels [h, w, 3]."""
    try:
        from insightface.utils.face_align import norm_crop
    except ImportError as error:
        raise BadRequest("faces need the extra: pip install 'hyperlora[face]'") from error
    crop: np.ndarray = norm_crop(image, keypoints.astype(np.float32), 112)
    return crop


def pixels(image: np.ndarray) -> Tensor:
    """[h, w, 3] to [3, h, w] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)


def background(rng: np.random.Generator, size: int) -> Image.Image:
    """A picture of nobody: plain, noise, tiles or a gradient, often with shapes on it."""
    cells = int(rng.choice([1, 1, 2, 4, 8, size]))
    small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
    how = Image.Resampling.NEAREST if rng.random() < 0.5 else Image.Resampling.BILINEAR
    canvas = small.resize((size, size), how)
    if rng.random() < 0.1:
        canvas.paste("black", (0, 0, size, size))  # where a picture is not square, insightface pads it
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(12)) if rng.random() < 0.6 else 0):
        x, y = rng.uniform(0, size, 2)
        w, h = size * rng.uniform(0.02, 0.5, 2)
        shape = draw.ellipse if rng.random() < 0.6 else draw.rectangle
        shape((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=_colour(rng))
    return canvas


def faceless(portrait: Image.Image, face: Landmarks, rng: np.random.Generator) -> Image.Image:
    """The portrait with its face painted over, blurred away, or cut to pieces."""
    match int(rng.integers(4)):
        case 0 | 1:
            hidden = portrait.copy()
            draw = ImageDraw.Draw(hidden)
            fill = portrait.getpixel((int(face.box[0] + face.box[2]) // 2, int(face.box[3]) - 2))
            shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
            shape(tuple(face.box), fill=fill if rng.random() < 0.6 else _colour(rng))
            return hidden
        case 2:
            return portrait.filter(ImageFilter.GaussianBlur(portrait.width / 8))
        case _:
            tile = portrait.width // 4
            whole = np.asarray(portrait)[: 4 * tile, : 4 * tile].reshape(4, tile, 4, tile, 3).swapaxes(1, 2)
            mixed = whole.reshape(16, tile, tile, 3)[rng.permutation(16)].reshape(4, 4, tile, tile, 3)
            return Image.fromarray(np.ascontiguousarray(mixed.swapaxes(1, 2)).reshape(4 * tile, 4 * tile, 3))


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    r, g, b = (int(value) for value in rng.integers(0, 256, 3))
    return r, g, b


def _shared(box: np.ndarray, other: np.ndarray) -> float:
    """How much of ``box`` lies in ``other`` (both left, top, right, bottom)."""
    inside = np.maximum(0, np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])).prod()
    return float(inside / np.maximum(1e-6, (box[2:] - box[:2]).prod()))
