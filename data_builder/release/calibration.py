"""Calibration of released models: out-of-distribution detector, identity embedder and scale."""

from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_builder.avatars.portrait_dataset import PortraitDataset
from hyperlora.data.images import array_to_tensor, to_tensor
from hyperlora.encoders.attribute_classifier import AttributeClassifier, predict_in_batches
from hyperlora.encoders.identity_embedder import IdentityEmbedder
from hyperlora.encoders.ood_detector import OodDetector, pool_features
from hyperlora.encoders.sidecar import compute_encoder_fingerprint
from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.errors import InvalidArgumentError
from hyperlora.evaluation.metrics import IdentityScale
from hyperlora.pipelines.auto import load_image_to_lora
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase
from hyperlora.progress import track

_NUM_TRAIN_PORTRAITS: Final = 6000
_NUM_VAL_PORTRAITS: Final = 1000
_BATCH_SIZE: Final = 64


def fit_ood_detector(
    model: Path, train_portraits: Path, val_portraits: Path, domain_name: str
) -> float:
    """Fit the out-of-distribution detector of an image-to-LoRA model and save it in its folder.

    Args:
        model: Folder of the model.
        train_portraits: Folder of drawn portraits of the split train.
        val_portraits: Folder of drawn portraits of the split validation, which set the threshold.
        domain_name: Plural noun for these images, for warnings.

    Returns:
        Distance up to which photos are in domain.

    Raises:
        InvalidArgumentError: If the portraits are of other splits.
    """
    image_to_lora = load_image_to_lora(model)
    train_images, val_images = PortraitDataset(train_portraits), PortraitDataset(val_portraits)
    splits = (train_images.config.split, val_images.config.split)
    if splits != ("train", "validation"):
        raise InvalidArgumentError(
            f"expected portraits of the splits train and validation, got {' and '.join(splits)}: "
            "draw them with `data-builder draw-portraits --split`"
        )
    ood_detector = OodDetector.fit(
        _encode_portraits(image_to_lora, train_images, _NUM_TRAIN_PORTRAITS),
        _encode_portraits(image_to_lora, val_images, _NUM_VAL_PORTRAITS),
        domain_name,
        compute_encoder_fingerprint(image_to_lora.encoder),
    )
    ood_detector.save(model)
    return ood_detector.threshold


def export_identity_embedder(model: Path, classifier_dir: Path) -> int:
    """Save the identity head of a classifier in the folder of an image-to-LoRA model with the same
    encoder.

    Args:
        model: Folder of the model.
        classifier_dir: Folder of the attribute classifier.

    Returns:
        Width of the identity embedding.

    Raises:
        InvalidArgumentError: If the encoders differ.
    """
    image_to_lora = load_image_to_lora(model)
    classifier = AttributeClassifier.from_pretrained(classifier_dir)
    encoder = image_to_lora.encoder
    model_fingerprint = compute_encoder_fingerprint(encoder)
    if not isinstance(encoder, TimmEncoder) or model_fingerprint != compute_encoder_fingerprint(
        classifier.encoder
    ):
        raise InvalidArgumentError(
            f"the encoder of {model} is not that of {classifier_dir}: give the classifier that it "
            "was taken from"
        )
    head = classifier.identity_head
    IdentityEmbedder(encoder, head.weight, head.bias).save(model)
    return head.out_features


def calibrate_identity_scale(evaluator: Path, portraits: Path) -> tuple[float, float]:
    """Measure mean cosines between identity embeddings and save them in the evaluator's
    ``config.json``.

    Args:
        evaluator: Folder of the attribute classifier.
        portraits: Folder of drawn portraits, two or more of each identity.

    Returns:
        Mean cosine of different identities, and of the same identity.

    Raises:
        InvalidArgumentError: If the portraits are of the split test, or one of each identity.
    """
    val_portraits = PortraitDataset(portraits)
    if val_portraits.config.split == "test" or val_portraits.config.portraits_per_identity < 2:
        raise InvalidArgumentError(
            f"{portraits} must hold two or more portraits of each identity of the split train or "
            "validation: draw them with `data-builder draw-portraits`"
        )
    classifier = AttributeClassifier.from_pretrained(evaluator)
    pixels = array_to_tensor(val_portraits.images[:_NUM_VAL_PORTRAITS])
    embeddings = predict_in_batches(classifier, pixels).identity  # [portraits, width]
    scale = IdentityScale.from_embeddings(
        embeddings.unflatten(0, (-1, val_portraits.config.portraits_per_identity))
    )
    classifier.identity_scale = (round(scale.different_cosine, 4), round(scale.same_cosine, 4))
    classifier.save_pretrained(evaluator)
    return classifier.identity_scale


def _encode_portraits(
    image_to_lora: ImageToLoraBase, portraits: PortraitDataset, max_portraits: int
) -> Tensor:
    """Encode up to ``max_portraits``, evenly spread over all identities, to pooled features [n,
    width].
    """
    num_portraits = min(max_portraits, len(portraits))
    indices = np.linspace(0, len(portraits) - 1, num_portraits).astype(int)
    batches = [indices[i : i + _BATCH_SIZE] for i in range(0, num_portraits, _BATCH_SIZE)]
    image_size, features = image_to_lora.encoder.image_size, []
    for batch in track(batches, "encoding", "portraits", num_portraits, _BATCH_SIZE):
        photos = torch.stack(
            [to_tensor(Image.fromarray(x), image_size) for x in portraits.images[batch]]
        )  # [n, 3, h, w]
        encoded = image_to_lora.encoder(photos[:, None])
        features.append(pool_features(encoded)[:, 0])  # [n, width]
    return torch.cat(features)
