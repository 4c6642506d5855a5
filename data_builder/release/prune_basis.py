"""Smaller files of released networks: only the basis directions that their codes on training images
need.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_builder.avatars.pair_dataset import PairDataset
from data_builder.avatars.portrait_dataset import PortraitDataset
from hyperlora.data.images import array_to_tensor
from hyperlora.features import ImageFeatures
from hyperlora.models.basis_pruning import prune_basis
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.progress import track


@torch.no_grad()
def prune_basis_model(
    model: Path, images_dir: Path, output_dir: Path, basis_size: int, num_subjects: int = 600
) -> float:
    """Prune the learned basis of a released model.

    Args:
        model: Folder of an ``ImageToLora`` or ``PairToLora`` with a learned basis.
        images_dir: Folder of drawn training portraits, or of drawn training pairs.
        output_dir: Folder to write.
        basis_size: Basis directions to keep.
        num_subjects: Subjects or pairs whose codes are used; the last sixth only measures the
            error.

    Returns:
        Mean relative error ‖ΔW - ΔŴ‖ / ‖ΔW‖ on that sixth.
    """
    is_pair_model = "num_edits" in json.loads((images_dir / "plan.json").read_text())
    pipeline: ImageToLora | PairToLora
    if is_pair_model:
        pipeline = PairToLora.from_pretrained(model)
        hypernetwork = pipeline.network.hypernetwork
        memories = _encode_pairs(pipeline, PairDataset(images_dir), num_subjects)
    else:
        pipeline = ImageToLora.from_pretrained(model)
        hypernetwork = pipeline.hypernetwork
        memories = _encode_photos(pipeline, PortraitDataset(images_dir), num_subjects)
    codes = torch.cat([hypernetwork.predict_codes(ImageFeatures(part)) for part in memories])
    num_fit = len(codes) * 5 // 6
    pruned = prune_basis(hypernetwork, codes[:num_fit], basis_size)
    held_out_memory = torch.cat(memories)[num_fit:]
    error = _compute_relative_error(hypernetwork, pruned, held_out_memory)
    if isinstance(pipeline, PairToLora):
        pipeline.network.hypernetwork = pruned
        pipeline.network.config = pipeline.network.config | {
            "head_options": pruned.config["head_options"]
        }
    else:
        pipeline.hypernetwork = pruned
    pipeline.save_pretrained(output_dir)
    return error


def _encode_photos(
    pipeline: ImageToLora, portraits: PortraitDataset, num_subjects: int
) -> list[Tensor]:
    """Encode the first portrait of each identity, in batches [n, tokens, width]."""
    portraits_per_identity = portraits.config.portraits_per_identity
    photos = portraits.images[: num_subjects * portraits_per_identity : portraits_per_identity]
    return [
        pipeline.encode_photos(array_to_tensor(part)[:, None]).image.tokens
        for part in _split_batches(photos)
    ]


def _encode_pairs(pipeline: PairToLora, dataset: PairDataset, num_subjects: int) -> list[Tensor]:
    """Encode pairs in both directions, in batches [n, tokens, width]."""
    memories = []
    for part in _split_batches(dataset.images[: 4 * num_subjects]):
        tokens = pipeline.encoder(array_to_tensor(part)[:, None]).tokens
        before, after = ImageFeatures(tokens[0::2]), ImageFeatures(tokens[1::2])
        memories += [
            pipeline.network.fuse_pair(before, after).tokens,
            pipeline.network.fuse_pair(after, before).tokens,
        ]
    return memories


def _split_batches(images: np.ndarray, batch_size: int = 64) -> list[np.ndarray]:
    """Split images into batches, with a progress bar."""
    batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    return list(track(batches, "encoding", "images", units_per_item=batch_size))


def _compute_relative_error(reference: Hypernetwork, pruned: Hypernetwork, memory: Tensor) -> float:
    """Mean relative error of ΔW over subjects."""
    loras, pruned_loras = (
        network.forward(ImageFeatures(memory)) for network in (reference, pruned)
    )
    errors, norms = [], []
    for delta, pruned_delta in zip(
        loras.get_delta_weights(), pruned_loras.get_delta_weights(), strict=True
    ):
        errors.append((delta - pruned_delta).square().sum((-2, -1)))  # [subjects]
        norms.append(delta.square().sum((-2, -1)))  # [subjects]
    return float((torch.stack(errors).sum(0) / torch.stack(norms).sum(0)).sqrt().mean())
