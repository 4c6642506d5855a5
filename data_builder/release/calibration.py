"""What released networks know: the pictures a model from photos was trained on, the identity scale of an evaluator."""

from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_builder.avatars.portrait_dataset import Portraits
from hyperlora.data.images import to_tensor
from hyperlora.encoders.attribute_classifier import Reader, read_in_batches
from hyperlora.encoders.identity_embedder import Identity
from hyperlora.encoders.ood_detector import Domain, described
from hyperlora.encoders.sidecar import digest
from hyperlora.errors import BadRequest
from hyperlora.evaluation.metrics import IdentityScale
from hyperlora.pipelines.auto import open_photo_model
from hyperlora.pipelines.image_to_lora_base import PhotoModel
from hyperlora.progress import track

_TRAINING: Final = 6000
_HELD_OUT: Final = 1000


def write_domain(model: Path, portraits: Path, held_out: Path, subjects: str) -> float:
    """``domain.safetensors`` beside the model in ``model``, from drawn training and validation portraits; the distance
    up to which photos are known."""
    network = open_photo_model(model)
    training, others = Portraits(portraits), Portraits(held_out)
    if (training.plan.split, others.plan.split) != ("train", "validation"):
        raise BadRequest("training portraits first and validation portraits second are expected: test stays unseen")
    seen, unseen = _seen(network, training, _TRAINING), _seen(network, others, _HELD_OUT)
    domain = Domain.of(seen, unseen, subjects, digest(network.encoder))
    domain.save(model)
    return domain.farthest


def write_identity(model: Path, reader: Path) -> int:
    """``identity.safetensors`` beside the model in ``model``: the identity space of the reader whose trunk is its photo
    encoder; returns its width. Raises ``BadRequest`` if the model looks through anything else."""
    network, taught = open_photo_model(model), Reader.from_pretrained(reader)
    if digest(network.encoder) != digest(taught.encoder):
        raise BadRequest(f"{model} does not look through {reader}: give the reader that its encoder comes from")
    head = taught.identity_head
    Identity(network.encoder, head.weight, head.bias).save(model)
    return head.out_features


def write_identity_scale(evaluator: Path, portraits: Path) -> tuple[float, float]:
    """Into the evaluator's ``config.json``: its mean cosines of portraits of different people, and of one person."""
    drawn = Portraits(portraits)
    if drawn.plan.split == "test" or drawn.plan.each < 2:
        raise BadRequest(f"{portraits} is no validation data with two or more portraits of each person")
    reader = Reader.from_pretrained(evaluator)
    identity = read_in_batches(reader, _pixels(drawn.images[:_HELD_OUT])).identity
    scale = IdentityScale.of(identity.unflatten(0, (-1, drawn.plan.each)))
    reader.identity_scale = (round(scale.different, 4), round(scale.same, 4))
    reader.save_pretrained(evaluator)
    return reader.identity_scale


def _seen(network: PhotoModel, drawn: Portraits, most: int) -> Tensor:
    """Up to ``most`` portraits as the network describes them, evenly from all people."""
    chosen = np.linspace(0, len(drawn) - 1, min(most, len(drawn))).astype(int)
    size, parts = network.encoder.image_size, []
    for some in track([chosen[i : i + 64] for i in range(0, len(chosen), 64)], "looking", "portraits", len(chosen), 64):
        photos = torch.stack([to_tensor(Image.fromarray(x), size) for x in drawn.images[some]])
        parts.append(described(network.encoder(photos[:, None]))[:, 0])
    return torch.cat(parts)


def _pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
