"""How much drawn portraits show the person of given photos, by the thread that owns the models."""

import asyncio
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from hyperlora.data.images import read_image, to_tensor
from hyperlora.encoders.identity_similarity import IdentitySimilarity
from hyperlora.service.engine.base import SubmitFn
from hyperlora.service.engine.batcher import BatchSpec
from hyperlora.service.engine.requests import SimilarityRequest


async def compute_similarity(
    identity_similarity: IdentitySimilarity,
    request: SimilarityRequest,
    timeout_s: float,
    submit: SubmitFn,
    decoder_slots: threading.Semaphore,
) -> list[float]:
    """The likeness of each picture."""

    def decode_images(files: Sequence[bytes]) -> Tensor:
        tensors = []
        for file in files:
            with decoder_slots:
                tensors.append(to_tensor(read_image(file), identity_similarity.image_size))
        return torch.stack(tensors)

    def compute_batch(items: list[tuple[Tensor, Tensor]]) -> list[list[float]]:
        return [identity_similarity(*item).tolist() for item in items]

    photos = await asyncio.to_thread(decode_images, request.photos)
    images = await asyncio.to_thread(decode_images, request.images)
    similarities: list[float] = await submit(
        BatchSpec(("likeness",), compute_batch, 8), (photos, images), timeout_s
    )
    return similarities
