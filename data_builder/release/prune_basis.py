"""Make a released network's file smaller: as many basis directions as its codes on training pictures need."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_builder.avatars.pair_dataset import PairDataset
from data_builder.avatars.portrait_dataset import PortraitDataset
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
    """Write ``model`` with ``size`` directions to ``output_dir``; ``images_dir`` are the drawn training portraits (of an
    ImageToLora) or pairs (of a PairToLora). Returns ‖ΔW - ΔŴ‖ / ‖ΔW‖, the mean over people that chose nothing."""
    is_pair_model = (images_dir / "plan.json").read_text().find("groups") >= 0
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
    portraits_per_identity = portraits.config.portraits_per_identity
    photos = portraits.images[: num_subjects * portraits_per_identity : portraits_per_identity]
    return [
        pipeline.encode_photos(_convert_to_tensor(part)[:, None]).tokens
        for part in _split_batches(photos)
    ]


def _encode_pairs(pipeline: PairToLora, dataset: PairDataset, num_subjects: int) -> list[Tensor]:
    memories = []
    for part in _split_batches(dataset.images[: 4 * num_subjects]):
        tokens = pipeline.encoder(_convert_to_tensor(part)[:, None]).tokens
        before, after = ImageFeatures(tokens[0::2]), ImageFeatures(tokens[1::2])
        memories += [
            pipeline.network.fuse_pair(before, after).tokens,
            pipeline.network.fuse_pair(after, before).tokens,
        ]
    return memories


def _split_batches(images: np.ndarray, batch_size: int = 64) -> list[np.ndarray]:
    return list(
        track(
            [images[i : i + batch_size] for i in range(0, len(images), batch_size)],
            "looking",
            "pictures",
            units_per_item=batch_size,
        )
    )


def _convert_to_tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255


def _compute_relative_error(reference: Hypernetwork, pruned: Hypernetwork, memory: Tensor) -> float:
    a, b = (network(ImageFeatures(memory)) for network in (reference, pruned))
    squares = [
        ((x - y).square().sum((-2, -1)), x.square().sum((-2, -1)))
        for x, y in zip(a.delta(), b.delta(), strict=True)
    ]
    error, norm = (torch.stack(part).sum(0) for part in zip(*squares, strict=True))
    return float((error / norm).sqrt().mean())
