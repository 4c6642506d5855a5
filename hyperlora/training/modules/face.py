"""Train the two networks of a face pack: what finds faces, and what tells people apart."""

from typing import Any, Final

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.encoders.face_networks import ANCHOR_SIZES, STRIDE, FaceDetector, FaceRecognizer
from hyperlora.training.augmentation import apply_random_degradation
from hyperlora.training.optimizers import make_adamw_cosine

FACE: Final = 1
AMBIGUOUS: Final = 2
"""Kinds of places in a scene: a face that is to be found, and one that need not be (0 is nothing)."""
_FACE_SIZE_RANGES: Final = ((16.0, 60.0), (48.0, 150.0))
"""Sides of the faces that each anchor answers for; it is not asked about those up to a quarter beyond."""


class FaceDetectorTraining(L.LightningModule):
    """Focal loss of the scores (1708.02002) + ``regression_weight`` times the smooth error of boxes and keypoints, in sides of the
    face.

    Batches: ``images`` [n, 3, h, w] in [0, 1], and of up to m faces in each ``boxes`` [n, m, 4] and ``keypoints``
    [n, m, 5, 2] in pixels and ``kinds`` [n, m] (``FACE``, ``AMBIGUOUS``, or 0 where there is none). Validation logs the
    mean error of the keypoints in sides of the face, and how often the surest place of a picture is right about there
    being a face.
    """

    def __init__(
        self,
        output_dir: str,
        widths: tuple[int, int, int] = (16, 24, 40),
        lr: float = 4e-3,
        regression_weight: float = 10.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.detector = FaceDetector(widths)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        predictions = self.detector.forward_level(
            _normalize_detector_input(apply_random_degradation(batch["images"]))
        ).float()
        targets = AnchorTargets.from_batch(batch, predictions.shape[1:3])
        num_positive = targets.positive_mask.sum().clamp_min(1)
        score_loss = (
            _compute_focal_loss(predictions[..., 0], targets.positive_mask) * targets.valid_mask
        ).sum() / num_positive
        regression_error = (
            F.smooth_l1_loss(
                predictions[..., 1:], targets.regression_targets, beta=0.02, reduction="none"
            )
            / targets.face_sizes[..., None]
        )
        regression_loss = (regression_error.mean(-1) * targets.positive_mask).sum() / num_positive
        self.log_dict({"train/scores": score_loss, "train/points": regression_loss}, prog_bar=True)
        return score_loss + self.hparams["regression_weight"] * regression_loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        predictions = self.detector.forward_level(
            _normalize_detector_input(batch["images"])
        ).float()
        targets = AnchorTargets.from_batch(batch, predictions.shape[1:3])
        keypoint_error = (predictions[..., 5:] - targets.regression_targets[..., 4:]).unflatten(
            -1, (5, 2)
        ).norm(dim=-1).mean(-1) / targets.face_sizes
        is_unambiguous = (batch["kinds"] != AMBIGUOUS).all(1)
        is_correct = (predictions[..., 0].flatten(1).amax(1) > 0) == (batch["kinds"] == FACE).any(1)
        n = len(is_unambiguous)
        self.log("val/keypoints", keypoint_error[targets.positive_mask].mean(), batch_size=n)
        self.log("val/right", is_correct[is_unambiguous].float().mean(), batch_size=n)

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.detector.save_pretrained(self.hparams["output_dir"])

    def configure_optimizers(self) -> dict[str, Any]:
        return make_adamw_cosine(self, self.parameters(), self.hparams["lr"])


class AnchorTargets:
    """What every anchor of a batch should say: ``positive_mask`` and ``valid_mask`` [n, h, w, anchors], ``regression_targets`` [..., 14] as the
    detector says them, ``face_sizes`` [...] of the faces in sides of the anchor."""

    def __init__(
        self,
        positive_mask: Tensor,
        valid_mask: Tensor,
        regression_targets: Tensor,
        face_sizes: Tensor,
    ) -> None:
        self.positive_mask, self.valid_mask, self.regression_targets, self.face_sizes = (
            positive_mask,
            valid_mask,
            regression_targets,
            face_sizes,
        )

    @classmethod
    def from_batch(cls, batch: dict[str, Tensor], grid_size: torch.Size) -> "AnchorTargets":
        """An anchor near the middle of a face of its range is to find it; those around are not asked."""
        boxes, kinds = (
            batch["boxes"][:, None, None],
            batch["kinds"][:, None, None],
        )  # [n, 1, 1, m, ...]
        rows, columns = (torch.arange(k, device=boxes.device) * float(STRIDE) for k in grid_size)
        anchor_points = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)[
            None, :, :, None
        ]  # [1, h, w, 1, xy]
        face_size = (boxes[..., 2:] - boxes[..., :2]).clamp_min(1).prod(-1).sqrt()  # [n, 1, 1, m]
        center_distance = (
            (anchor_points - (boxes[..., :2] + boxes[..., 2:]) / 2).abs().amax(-1)
        )  # [n, h, w, m]
        is_center, is_near_center = (
            center_distance <= (0.15 * face_size).clamp_min(4.1),
            center_distance <= (0.35 * face_size).clamp_min(8.2),
        )
        nearest_face = (center_distance / face_size + 1e3 * (kinds != FACE)).argmin(
            -1, keepdim=True
        )
        min_size, max_size = (
            torch.tensor(ends, device=boxes.device) for ends in zip(*_FACE_SIZE_RANGES, strict=True)
        )
        size_per_anchor = face_size[..., None]
        in_range = (size_per_anchor >= min_size) & (
            size_per_anchor <= max_size
        )  # [n, 1, 1, m, anchors]
        near_range = (size_per_anchor >= min_size / 1.25) & (size_per_anchor <= max_size * 1.25)
        positive_mask = (is_center & (kinds == FACE))[..., None] & in_range
        ignore_mask = (is_near_center & (kinds > 0))[..., None] & near_range
        positive_mask = positive_mask.any(-2)
        anchors = torch.tensor(ANCHOR_SIZES, device=boxes.device)
        regression_targets = (
            _encode_regression_targets(batch, anchor_points, nearest_face)[..., None, :]
            / anchors[:, None]
        )
        target_sizes = face_size.expand_as(center_distance).gather(-1, nearest_face) / anchors
        return cls(
            positive_mask, positive_mask | ~ignore_mask.any(-2), regression_targets, target_sizes
        )


def _encode_regression_targets(
    batch: dict[str, Tensor], anchor_points: Tensor, nearest_face: Tensor
) -> Tensor:
    """Sides and keypoints [n, h, w, 14] of the face nearest to each place, in pixels from there."""
    n = len(batch["kinds"])
    anchor_points = anchor_points[..., 0, :]  # [1, h, w, xy]
    face_index = torch.arange(n, device=nearest_face.device).view(-1, 1, 1), nearest_face[..., 0]
    box, keypoints = (
        batch["boxes"][face_index],
        batch["keypoints"][face_index],
    )  # [n, h, w, 4], [n, h, w, 5, xy]
    box_distances = torch.cat([anchor_points - box[..., :2], box[..., 2:] - anchor_points], -1)
    return torch.cat([box_distances, (keypoints - anchor_points[..., None, :]).flatten(-2)], -1)


class FaceRecognizerTraining(L.LightningModule):
    """CosFace (1801.09414) over the people of training: softmax of ``scale`` times the cosines to everybody's centre,
    that to the right one less ``margin``.

    Batches: ``faces`` [n, 3, 112, 112] in [0, 1], ``subject`` [n], which row of ``identity_vector_dim`` [people, k] each face is.
    A centre is a linear map of who somebody is (``identity_vector_dim``), not a free vector: four portraits of each person are too
    few for that, and nobody's centre is where another's face should be. Validation logs the mean cosine of two
    portraits of one person and of different people (``subject`` [n] is enough).
    """

    def __init__(
        self,
        output_dir: str,
        backbone: str,
        identity_vector_dim: int,
        options: dict[str, Any] | None = None,
        width: int = 512,
        scale: float = 32.0,
        margin: float = 0.2,
        lr: float = 2e-3,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.recognizer = FaceRecognizer(backbone, width, options)
        self.class_centers = nn.Linear(identity_vector_dim, width)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        embeddings = self._encode_faces(apply_random_degradation(batch["faces"]))
        cosines = embeddings @ F.normalize(self.class_centers(batch["traits"]).float(), dim=-1).mT
        target_one_hot = F.one_hot(batch["subject"], len(batch["traits"]))
        loss = F.cross_entropy(
            self.hparams["scale"] * (cosines - self.hparams["margin"] * target_one_hot),
            batch["subject"],
        )
        accuracy = (cosines.argmax(-1) == batch["subject"]).float().mean()
        self.log_dict({"train/loss": loss, "train/named": accuracy}, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        embeddings = self._encode_faces(batch["faces"])
        cosines, subject = embeddings @ embeddings.mT, batch["subject"]
        is_same = (subject[:, None] == subject) & ~torch.eye(
            len(subject), dtype=torch.bool, device=subject.device
        )
        self.log("val/same", cosines[is_same].mean(), batch_size=len(subject))
        self.log(
            "val/different", cosines[subject[:, None] != subject].mean(), batch_size=len(subject)
        )

    def _encode_faces(self, faces: Tensor) -> Tensor:
        return F.normalize(self.recognizer(faces * 2 - 1).float(), dim=-1)

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.recognizer.save_pretrained(self.hparams["output_dir"])

    def configure_optimizers(self) -> dict[str, Any]:
        return make_adamw_cosine(
            self, self.parameters(), self.hparams["lr"], self.hparams["weight_decay"]
        )


def _normalize_detector_input(images: Tensor) -> Tensor:
    """[0, 1] to what insightface feeds a detector."""
    return (images * 255 - 127.5) / 128


def _compute_focal_loss(logits: Tensor, positive_mask: Tensor) -> Tensor:
    """Binary cross-entropy, less where the answer is right already (γ = 2)."""
    target = positive_mask.float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return cross_entropy * (target - logits.sigmoid()).abs() ** 2
