"""What released networks know: the pictures a model from photos was trained on, the identity scale of an evaluator."""

from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_builder.avatars.portrait_dataset import PortraitDataset
from hyperlora.data.images import to_tensor
from hyperlora.encoders.attribute_classifier import AttributeClassifier, predict_in_batches
from hyperlora.encoders.identity_embedder import IdentityEmbedder
from hyperlora.encoders.ood_detector import OodDetector, pool_features
from hyperlora.encoders.sidecar import compute_encoder_fingerprint
from hyperlora.errors import InvalidArgumentError
from hyperlora.evaluation.metrics import IdentityScale
from hyperlora.pipelines.auto import load_image_to_lora
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase
from hyperlora.progress import track

_NUM_TRAIN_PORTRAITS: Final = 6000
_NUM_VAL_PORTRAITS: Final = 1000


def fit_ood_detector(
    model: Path, train_portraits: Path, val_portraits: Path, domain_name: str
) -> float:
    """``domain.safetensors`` beside the model in ``model``, from drawn training and validation portraits; the distance
    up to which photos are known."""
    image_to_lora = load_image_to_lora(model)
    train_images, val_images = PortraitDataset(train_portraits), PortraitDataset(val_portraits)
    if (train_images.config.split, val_images.config.split) != ("train", "validation"):
        raise InvalidArgumentError(
            "training portraits first and validation portraits second are expected: test stays unseen"
        )
    train_features, val_features = (
        _encode_portraits(image_to_lora, train_images, _NUM_TRAIN_PORTRAITS),
        _encode_portraits(image_to_lora, val_images, _NUM_VAL_PORTRAITS),
    )
    ood_detector = OodDetector.fit(
        train_features,
        val_features,
        domain_name,
        compute_encoder_fingerprint(image_to_lora.encoder),
    )
    ood_detector.save(model)
    return ood_detector.threshold


def export_identity_embedder(model: Path, classifier_dir: Path) -> int:
    """``sample_identity.safetensors`` beside the model in ``model``: the identity space of the reader whose trunk is its photo
    encoder; returns its width. Raises ``InvalidArgumentError`` if the model looks through anything else."""
    image_to_lora, classifier = (
        load_image_to_lora(model),
        AttributeClassifier.from_pretrained(classifier_dir),
    )
    if compute_encoder_fingerprint(image_to_lora.encoder) != compute_encoder_fingerprint(
        classifier.encoder
    ):
        raise InvalidArgumentError(
            f"{model} does not look through {classifier_dir}: give the reader that its encoder comes from"
        )
    head = classifier.identity_head
    IdentityEmbedder(image_to_lora.encoder, head.weight, head.bias).save(model)
    return head.out_features


def calibrate_identity_scale(evaluator: Path, portraits: Path) -> tuple[float, float]:
    """Into the evaluator's ``config.json``: its mean cosines of portraits of different people, and of one person."""
    val_portraits = PortraitDataset(portraits)
    if val_portraits.config.split == "test" or val_portraits.config.portraits_per_identity < 2:
        raise InvalidArgumentError(
            f"{portraits} is no validation data with two or more portraits of each person"
        )
    classifier = AttributeClassifier.from_pretrained(evaluator)
    identity = predict_in_batches(
        classifier, _convert_to_pixels(val_portraits.images[:_NUM_VAL_PORTRAITS])
    ).identity
    scale = IdentityScale.from_embeddings(
        identity.unflatten(0, (-1, val_portraits.config.portraits_per_identity))
    )
    classifier.identity_scale = (round(scale.different_cosine, 4), round(scale.same_cosine, 4))
    classifier.save_pretrained(evaluator)
    return classifier.identity_scale


def _encode_portraits(
    image_to_lora: ImageToLoraBase, portraits: PortraitDataset, max_portraits: int
) -> Tensor:
    """Up to ``max_portraits`` portraits as the network describes them, evenly from all people."""
    indices = np.linspace(0, len(portraits) - 1, min(max_portraits, len(portraits))).astype(int)
    size, parts = image_to_lora.encoder.image_size, []
    for batch in track(
        [indices[i : i + 64] for i in range(0, len(indices), 64)],
        "looking",
        "portraits",
        len(indices),
        64,
    ):
        photos = torch.stack([to_tensor(Image.fromarray(x), size) for x in portraits.images[batch]])
        parts.append(pool_features(image_to_lora.encoder(photos[:, None]))[:, 0])
    return torch.cat(parts)


def _convert_to_pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
