"""Make a released network's file smaller: as many basis directions as its codes on training pictures need."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_builder.avatars.pair_dataset import DrawnPairs
from data_builder.avatars.portrait_dataset import Portraits
from hyperlora.features import ImageFeatures
from hyperlora.models.basis_pruning import shrunk
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.progress import track


@torch.no_grad()
def shrink(model: Path, pictures: Path, out: Path, size: int, people: int = 600) -> float:
    """Write ``model`` with ``size`` directions to ``out``; ``pictures`` are the drawn training portraits (of an
    ImageToLora) or pairs (of a PairToLora). Returns ‖ΔW - ΔŴ‖ / ‖ΔW‖, the mean over people that chose nothing."""
    pairs = (pictures / "plan.json").read_text().find("groups") >= 0
    network: ImageToLora | PairToLora
    if pairs:
        network = PairToLora.from_pretrained(model)
        hypernetwork = network.network.hypernetwork
        memories = _pair_memories(network, DrawnPairs(pictures), people)
    else:
        network = ImageToLora.from_pretrained(model)
        hypernetwork = network.hypernetwork
        memories = _photo_memories(network, Portraits(pictures), people)
    codes = torch.cat([hypernetwork.codes(ImageFeatures(part)) for part in memories])
    used = len(codes) * 5 // 6
    small = shrunk(hypernetwork, codes[:used], size)
    rest = torch.cat(memories)[used:]
    error = _apart(hypernetwork, small, rest)
    if isinstance(network, PairToLora):
        network.network.hypernetwork = small
        network.network.config = network.network.config | {"head_options": small.config["head_options"]}
    else:
        network.hypernetwork = small
    network.save_pretrained(out)
    return error


def _photo_memories(network: ImageToLora, portraits: Portraits, people: int) -> list[Tensor]:
    each = portraits.plan.each
    photos = portraits.images[: people * each : each]
    return [network.features(_pixels(part)[:, None]).tokens for part in _parts(photos)]


def _pair_memories(network: PairToLora, drawn: DrawnPairs, people: int) -> list[Tensor]:
    found = []
    for part in _parts(drawn.images[: 4 * people]):
        tokens = network.encoder(_pixels(part)[:, None]).tokens
        before, after = ImageFeatures(tokens[0::2]), ImageFeatures(tokens[1::2])
        found += [network.network.joined(before, after).tokens, network.network.joined(after, before).tokens]
    return found


def _parts(images: np.ndarray, size: int = 64) -> list[np.ndarray]:
    return list(track([images[i : i + size] for i in range(0, len(images), size)], "looking", "pictures", size=size))


def _pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255


def _apart(one: Hypernetwork, other: Hypernetwork, memories: Tensor) -> float:
    a, b = (network(ImageFeatures(memories)) for network in (one, other))
    squares = [
        ((x - y).square().sum((-2, -1)), x.square().sum((-2, -1))) for x, y in zip(a.delta(), b.delta(), strict=True)
    ]
    error, size = (torch.stack(part).sum(0) for part in zip(*squares, strict=True))
    return float((error / size).sqrt().mean())
