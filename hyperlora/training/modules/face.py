"""Train the two networks of a face pack: a face detector and a face recognizer."""

from dataclasses import dataclass
from typing import Final, Self

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.encoders.face_networks import ANCHOR_SIZES, STRIDE, FaceDetector, FaceRecognizer
from hyperlora.training.augmentation import apply_random_degradation
from hyperlora.training.batches import FaceDetectionBatch, FaceRecognitionBatch
from hyperlora.training.modules.options import Options
from hyperlora.training.optimizers import make_adamw_cosine

FACE: Final = 1
"""Kind of a face that the detector must find."""
AMBIGUOUS: Final = 2
"""Kind of a face that it may find or miss; 0 is no face."""
_FACE_SIZE_RANGES: Final = ((16.0, 60.0), (48.0, 150.0))
"""Smallest and largest face in pixels that each anchor detects; up to a quarter beyond, the anchor
has no loss."""
_FAR: Final = 1e3
"""Added to the distance of faces that are no targets, in sides of the face."""


class FaceDetectorTraining(L.LightningModule):
    """Train on the focal loss of scores (1708.02002) and a smooth L1 of boxes and keypoints.

    The regression error is measured in sides of the face. Validation logs the mean error of the
    keypoints, and how often the highest score of an image is right about it having a face.

    Args:
        output_dir: Folder that receives the detector when training ends.
        widths: Channels of the three stages.
        lr: Peak learning rate of AdamW.
        regression_weight: Weight of the regression error.
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

    def training_step(self, batch: FaceDetectionBatch, batch_idx: int) -> Tensor:
        """Compute the loss of degraded images.

        Args:
            batch: Images with their faces.
            batch_idx: Not used.

        Returns:
            Loss, a scalar.
        """
        predictions, targets = self._predict(batch, apply_random_degradation(batch.images))
        num_positive = targets.positive_mask.sum().clamp_min(1)
        score_losses = _compute_focal_loss(predictions[..., 0], targets.positive_mask)
        score_loss = (score_losses * targets.valid_mask).sum() / num_positive

        errors = F.smooth_l1_loss(
            predictions[..., 1:], targets.regression_targets, beta=0.02, reduction="none"
        )  # [n, h, w, anchors, 14]
        relative_errors = (errors / targets.face_sizes[..., None]).mean(-1)  # [n, h, w, anchors]
        regression_loss = (relative_errors * targets.positive_mask).sum() / num_positive
        self.log_dict(
            {"train/score_loss": score_loss, "train/regression_loss": regression_loss},
            prog_bar=True,
        )
        return score_loss + self.hparams["regression_weight"] * regression_loss

    def validation_step(self, batch: FaceDetectionBatch, batch_idx: int) -> None:
        """Log the error of keypoints in sides of the face, and the accuracy of the highest score.

        Args:
            batch: Images with their faces.
            batch_idx: Not used.
        """
        predictions, targets = self._predict(batch, batch.images)
        offsets = predictions[..., 5:] - targets.regression_targets[..., 4:]
        distances = offsets.unflatten(-1, (5, 2)).norm(dim=-1).mean(-1)  # [n, h, w, anchors]
        keypoint_error = distances / targets.face_sizes

        is_unambiguous = (batch.face_kinds != AMBIGUOUS).all(1)  # [n]
        has_face = (batch.face_kinds == FACE).any(1)  # [n]
        has_detection = predictions[..., 0].flatten(1).amax(1) > 0  # [n]
        is_correct = has_detection == has_face
        n = len(is_correct)
        self.log("val/keypoint_error", keypoint_error[targets.positive_mask].mean(), batch_size=n)
        self.log("val/accuracy", is_correct[is_unambiguous].float().mean(), batch_size=n)

    def _predict(self, batch: FaceDetectionBatch, images: Tensor) -> tuple[Tensor, "AnchorTargets"]:
        """Predict [n, h, w, anchors, 15] for ``images`` [n, 3, h, w] and make the targets."""
        predictions = self.detector.forward_level(_normalize_detector_input(images)).float()
        return predictions, AnchorTargets.from_batch(batch, predictions.shape[1:3])

    def on_train_end(self) -> None:
        """Write the detector."""
        if self.trainer.is_global_zero:
            self.detector.save_pretrained(self.hparams["output_dir"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make AdamW with one cosine cycle."""
        return make_adamw_cosine(self, self.parameters(), self.hparams["lr"])


@dataclass(frozen=True)
class AnchorTargets:
    """What every anchor of a batch should predict."""

    positive_mask: Tensor
    """Whether an anchor must find a face, [n, h, w, anchors]."""
    valid_mask: Tensor
    """Whether its score has a loss, [n, h, w, anchors]."""
    regression_targets: Tensor
    """Sides and keypoints in sides of the anchor, as the detector predicts them: [..., 14]."""
    face_sizes: Tensor
    """Side of the nearest face in sides of the anchor, [n, h, w, anchors]."""

    @classmethod
    def from_batch(cls, batch: FaceDetectionBatch, grid_size: torch.Size) -> Self:
        """Assign faces to anchors.

        An anchor must find a face of its size range whose center is near. Anchors a little
        farther, or a little too small or large, have no loss.

        Args:
            batch: Images with up to m faces each.
            grid_size: Height and width of the grid of anchors.

        Returns:
            The targets.
        """
        boxes = batch.boxes[:, None, None]  # [n, 1, 1, m, 4]
        kinds = batch.face_kinds[:, None, None]  # [n, 1, 1, m]
        rows, columns = (torch.arange(k, device=boxes.device) * float(STRIDE) for k in grid_size)
        points = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)  # [h, w, 2]
        anchor_points = points[None, :, :, None]  # [1, h, w, 1, 2]

        face_size = (boxes[..., 2:] - boxes[..., :2]).clamp_min(1).prod(-1).sqrt()  # [n, 1, 1, m]
        face_center = (boxes[..., :2] + boxes[..., 2:]) / 2  # [n, 1, 1, m, 2]
        center_distance = (anchor_points - face_center).abs().amax(-1)  # [n, h, w, m]
        is_center = center_distance <= (0.15 * face_size).clamp_min(4.1)
        is_near_center = center_distance <= (0.35 * face_size).clamp_min(8.2)
        relative_distance = center_distance / face_size + _FAR * (kinds != FACE)
        nearest_face = relative_distance.argmin(-1, keepdim=True)  # [n, h, w, 1]

        min_size, max_size = (
            torch.tensor(ends, device=boxes.device) for ends in zip(*_FACE_SIZE_RANGES, strict=True)
        )  # [anchors] each
        size = face_size[..., None]  # [n, 1, 1, m, 1]
        in_range = (size >= min_size) & (size <= max_size)  # [n, 1, 1, m, anchors]
        near_range = (size >= min_size / 1.25) & (size <= max_size * 1.25)
        is_target = (is_center & (kinds == FACE))[..., None] & in_range  # [n, h, w, m, anchors]
        is_ignored = (is_near_center & (kinds > 0))[..., None] & near_range
        positive_mask = is_target.any(-2)  # [n, h, w, anchors]
        valid_mask = positive_mask | ~is_ignored.any(-2)

        anchors = torch.tensor(ANCHOR_SIZES, device=boxes.device)
        offsets = _compute_offsets(batch, anchor_points[..., 0, :], nearest_face[..., 0])
        regression_targets = offsets[..., None, :] / anchors[:, None]  # [n, h, w, anchors, 14]
        nearest_size = face_size.expand_as(center_distance).gather(-1, nearest_face)
        return cls(positive_mask, valid_mask, regression_targets, nearest_size / anchors)


def _compute_offsets(
    batch: FaceDetectionBatch, anchor_points: Tensor, nearest_face: Tensor
) -> Tensor:
    """Compute distances to the sides and keypoints of the nearest face, in pixels.

    Args:
        batch: Images with up to m faces each.
        anchor_points: (x, y) of the anchors [1, h, w, 2].
        nearest_face: Index of a face [n, h, w].

    Returns:
        Distances to left, top, right, bottom, and (x, y) of five keypoints, [n, h, w, 14].
    """
    sample_index = torch.arange(len(nearest_face), device=nearest_face.device).view(-1, 1, 1)
    box = batch.boxes[sample_index, nearest_face]  # [n, h, w, 4]
    keypoints = batch.keypoints[sample_index, nearest_face]  # [n, h, w, 5, 2]
    keypoint_offsets = (keypoints - anchor_points[..., None, :]).flatten(-2)  # [n, h, w, 10]
    return torch.cat(
        [anchor_points - box[..., :2], box[..., 2:] - anchor_points, keypoint_offsets], -1
    )


class FaceRecognizerTraining(L.LightningModule):
    """Train on CosFace (1801.09414): softmax of cosines to class centers, with a margin.

    A class center is a linear map of the identity's attributes, not a free vector: four portraits
    of each person are too few to learn one. Validation logs the mean cosine of two portraits of
    the same person and of different people.

    Args:
        output_dir: Folder that receives the recognizer when training ends.
        backbone: A timm id.
        identity_vector_dim: Length of the identity vectors of the data.
        options: Arguments of the backbone.
        width: Length of an embedding.
        scale: Factor s of the cosines.
        margin: m, subtracted from the cosine to the right center.
        lr: Peak learning rate of AdamW.
        weight_decay: Of AdamW.
    """

    def __init__(
        self,
        output_dir: str,
        backbone: str,
        identity_vector_dim: int,
        options: Options | None = None,
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

    def training_step(self, batch: FaceRecognitionBatch, batch_idx: int) -> Tensor:
        """Compute the CosFace loss of degraded faces (1801.09414, eq. 4).

        Args:
            batch: Faces with the identity vectors of the classes.
            batch_idx: Not used.

        Returns:
            Loss, a scalar.
        """
        assert batch.identity_vectors is not None
        embeddings = self._encode_faces(apply_random_degradation(batch.faces))  # [n, width]
        centers = F.normalize(self.class_centers(batch.identity_vectors).float(), dim=-1)
        cosines = embeddings @ centers.mT  # [n, num_identities]
        is_target = F.one_hot(batch.subject_ids, len(centers))
        logits = self.hparams["scale"] * (cosines - self.hparams["margin"] * is_target)
        loss = F.cross_entropy(logits, batch.subject_ids)
        accuracy = (cosines.argmax(-1) == batch.subject_ids).float().mean()
        self.log_dict({"train/loss": loss, "train/accuracy": accuracy}, prog_bar=True)
        return loss

    def validation_step(self, batch: FaceRecognitionBatch, batch_idx: int) -> None:
        """Log mean cosines of portraits of the same person and of different people.

        Args:
            batch: Faces with any ids of their subjects.
            batch_idx: Not used.
        """
        embeddings, ids = self._encode_faces(batch.faces), batch.subject_ids
        cosines = embeddings @ embeddings.mT  # [n, n]
        is_same_subject = ids[:, None] == ids
        is_self = torch.eye(len(ids), dtype=torch.bool, device=ids.device)
        cosine_same = cosines[is_same_subject & ~is_self].mean()
        self.log("val/cosine_same", cosine_same, batch_size=len(ids))
        self.log("val/cosine_different", cosines[~is_same_subject].mean(), batch_size=len(ids))

    def _encode_faces(self, faces: Tensor) -> Tensor:
        """Encode faces [n, 3, 112, 112] in [0, 1] to embeddings [n, width] of unit length."""
        return F.normalize(self.recognizer(faces * 2 - 1).float(), dim=-1)

    def on_train_end(self) -> None:
        """Write the recognizer."""
        if self.trainer.is_global_zero:
            self.recognizer.save_pretrained(self.hparams["output_dir"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make AdamW with one cosine cycle."""
        return make_adamw_cosine(
            self, self.parameters(), self.hparams["lr"], self.hparams["weight_decay"]
        )


def _normalize_detector_input(images: Tensor) -> Tensor:
    """Map images in [0, 1] to the range that insightface passes to a detector."""
    return (images * 255 - 127.5) / 128


def _compute_focal_loss(logits: Tensor, positive_mask: Tensor) -> Tensor:
    """Compute |y - p|^γ CE(p, y) with γ = 2 for every logit (1708.02002, eq. 4)."""
    target = positive_mask.float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return cross_entropy * (target - logits.sigmoid()).abs() ** 2
