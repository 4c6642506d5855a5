"""Train the two networks of a face pack: what finds faces, and what tells people apart."""

from typing import Any, Final

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.encoders.face_networks import ANCHORS, STRIDE, FaceDetector, FaceRecogniser
from hyperlora.training.augmentation import degraded
from hyperlora.training.optimizers import adamw_one_cycle

FACE: Final = 1
UNCLEAR: Final = 2
"""Kinds of places in a scene: a face that is to be found, and one that need not be (0 is nothing)."""
_RANGES: Final = ((16.0, 60.0), (48.0, 150.0))
"""Sides of the faces that each anchor answers for; it is not asked about those up to a quarter beyond."""


class FaceDetectorTraining(L.LightningModule):
    """Focal loss of the scores (1708.02002) + ``points`` times the smooth error of boxes and keypoints, in sides of the
    face.

    Batches: ``images`` [n, 3, h, w] in [0, 1], and of up to m faces in each ``boxes`` [n, m, 4] and ``keypoints``
    [n, m, 5, 2] in pixels and ``kinds`` [n, m] (``FACE``, ``UNCLEAR``, or 0 where there is none). Validation logs the
    mean error of the keypoints in sides of the face, and how often the surest place of a picture is right about there
    being a face.
    """

    def __init__(
        self, out: str, widths: tuple[int, int, int] = (16, 24, 40), lr: float = 4e-3, points: float = 10.0
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.detector = FaceDetector(widths)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        said = self.detector.level(_signed(degraded(batch["images"]))).float()
        wanted = Wanted.of(batch, said.shape[1:3])
        count = wanted.found.sum().clamp_min(1)
        scores = (_focal(said[..., 0], wanted.found) * wanted.asked).sum() / count
        places = F.smooth_l1_loss(said[..., 1:], wanted.places, beta=0.02, reduction="none") / wanted.sides[..., None]
        points = (places.mean(-1) * wanted.found).sum() / count
        self.log_dict({"train/scores": scores, "train/points": points}, prog_bar=True)
        return scores + self.hparams["points"] * points

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        said = self.detector.level(_signed(batch["images"])).float()
        wanted = Wanted.of(batch, said.shape[1:3])
        apart = (said[..., 5:] - wanted.places[..., 4:]).unflatten(-1, (5, 2)).norm(dim=-1).mean(-1) / wanted.sides
        clear = (batch["kinds"] != UNCLEAR).all(1)
        right = (said[..., 0].flatten(1).amax(1) > 0) == (batch["kinds"] == FACE).any(1)
        n = len(clear)
        self.log("val/keypoints", apart[wanted.found].mean(), batch_size=n)
        self.log("val/right", right[clear].float().mean(), batch_size=n)

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.detector.save_pretrained(self.hparams["out"])

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw_one_cycle(self, self.parameters(), self.hparams["lr"])


class Wanted:
    """What every anchor of a batch should say: ``found`` and ``asked`` [n, h, w, anchors], ``places`` [..., 14] as the
    detector says them, ``sides`` [...] of the faces in sides of the anchor."""

    def __init__(self, found: Tensor, asked: Tensor, places: Tensor, sides: Tensor) -> None:
        self.found, self.asked, self.places, self.sides = found, asked, places, sides

    @classmethod
    def of(cls, batch: dict[str, Tensor], grid: torch.Size) -> "Wanted":
        """An anchor near the middle of a face of its range is to find it; those around are not asked."""
        boxes, kinds = batch["boxes"][:, None, None], batch["kinds"][:, None, None]  # [n, 1, 1, m, ...]
        rows, columns = (torch.arange(k, device=boxes.device) * float(STRIDE) for k in grid)
        where = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)[None, :, :, None]  # [1, h, w, 1, xy]
        side = (boxes[..., 2:] - boxes[..., :2]).clamp_min(1).prod(-1).sqrt()  # [n, 1, 1, m]
        off = (where - (boxes[..., :2] + boxes[..., 2:]) / 2).abs().amax(-1)  # [n, h, w, m]
        near, around = off <= (0.15 * side).clamp_min(4.1), off <= (0.35 * side).clamp_min(8.2)
        nearest = (off / side + 1e3 * (kinds != FACE)).argmin(-1, keepdim=True)
        least, most = (torch.tensor(ends, device=boxes.device) for ends in zip(*_RANGES, strict=True))
        sides = side[..., None]
        fits = (sides >= least) & (sides <= most)  # [n, 1, 1, m, anchors]
        almost = (sides >= least / 1.25) & (sides <= most * 1.25)
        found = (near & (kinds == FACE))[..., None] & fits
        spared = (around & (kinds > 0))[..., None] & almost
        found = found.any(-2)
        anchors = torch.tensor(ANCHORS, device=boxes.device)
        places = _places(batch, where, nearest)[..., None, :] / anchors[:, None]
        chosen = side.expand_as(off).gather(-1, nearest) / anchors
        return cls(found, found | ~spared.any(-2), places, chosen)


def _places(batch: dict[str, Tensor], where: Tensor, nearest: Tensor) -> Tensor:
    """Sides and keypoints [n, h, w, 14] of the face nearest to each place, in pixels from there."""
    n = len(batch["kinds"])
    where = where[..., 0, :]  # [1, h, w, xy]
    of = torch.arange(n, device=nearest.device).view(-1, 1, 1), nearest[..., 0]
    box, points = batch["boxes"][of], batch["keypoints"][of]  # [n, h, w, 4], [n, h, w, 5, xy]
    ends = torch.cat([where - box[..., :2], box[..., 2:] - where], -1)
    return torch.cat([ends, (points - where[..., None, :]).flatten(-2)], -1)


class FaceRecogniserTraining(L.LightningModule):
    """CosFace (1801.09414) over the people of training: softmax of ``scale`` times the cosines to everybody's centre,
    that to the right one less ``margin``.

    Batches: ``faces`` [n, 3, 112, 112] in [0, 1], ``subject`` [n], which row of ``traits`` [people, k] each face is.
    A centre is a linear map of who somebody is (``traits``), not a free vector: four portraits of each person are too
    few for that, and nobody's centre is where another's face should be. Validation logs the mean cosine of two
    portraits of one person and of different people (``subject`` [n] is enough).
    """

    def __init__(
        self, out: str, backbone: str, traits: int, options: dict[str, Any] | None = None, width: int = 512,
        scale: float = 32.0, margin: float = 0.2, lr: float = 2e-3, weight_decay: float = 0.05,
    ) -> None:  # fmt: skip
        super().__init__()
        self.save_hyperparameters()
        self.recogniser = FaceRecogniser(backbone, width, options)
        self.centres = nn.Linear(traits, width)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        seen = self._seen(degraded(batch["faces"]))
        cosines = seen @ F.normalize(self.centres(batch["traits"]).float(), dim=-1).mT
        right = F.one_hot(batch["subject"], len(batch["traits"]))
        loss = F.cross_entropy(self.hparams["scale"] * (cosines - self.hparams["margin"] * right), batch["subject"])
        named = (cosines.argmax(-1) == batch["subject"]).float().mean()
        self.log_dict({"train/loss": loss, "train/named": named}, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        seen = self._seen(batch["faces"])
        cosines, who = seen @ seen.mT, batch["subject"]
        same = (who[:, None] == who) & ~torch.eye(len(who), dtype=torch.bool, device=who.device)
        self.log("val/same", cosines[same].mean(), batch_size=len(who))
        self.log("val/different", cosines[who[:, None] != who].mean(), batch_size=len(who))

    def _seen(self, faces: Tensor) -> Tensor:
        return F.normalize(self.recogniser(faces * 2 - 1).float(), dim=-1)

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.recogniser.save_pretrained(self.hparams["out"])

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw_one_cycle(self, self.parameters(), self.hparams["lr"], self.hparams["weight_decay"])


def _signed(images: Tensor) -> Tensor:
    """[0, 1] to what insightface feeds a detector."""
    return (images * 255 - 127.5) / 128


def _focal(logits: Tensor, found: Tensor) -> Tensor:
    """Binary cross-entropy, less where the answer is right already (γ = 2)."""
    truth = found.float()
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return entropy * (truth - logits.sigmoid()).abs() ** 2
