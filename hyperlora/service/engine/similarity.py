"""How much drawn portraits show the person of given photos, by the thread that owns the models."""

import asyncio
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from hyperlora.data.images import read_image, to_tensor
from hyperlora.encoders.identity_similarity import Likeness
from hyperlora.service.engine.base import Do
from hyperlora.service.engine.batcher import Work
from hyperlora.service.engine.requests import LikenessOrder


async def compared(
    likeness: Likeness, order: LikenessOrder, seconds: float, do: Do, readers: threading.Semaphore
) -> list[float]:
    """The likeness of each picture."""

    def decoded(files: Sequence[bytes]) -> Tensor:
        parts = []
        for file in files:
            with readers:
                parts.append(to_tensor(read_image(file), likeness.image_size))
        return torch.stack(parts)

    def compare(items: list[tuple[Tensor, Tensor]]) -> list[list[float]]:
        return [likeness(*item).tolist() for item in items]

    photos = await asyncio.to_thread(decoded, order.photos)
    pictures = await asyncio.to_thread(decoded, order.pictures)
    found: list[float] = await do(Work(("likeness",), compare, 8), (photos, pictures), seconds)
    return found
