"""Identity similarity of images to photos, by the thread that owns the models."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hyperlora.data.images import to_tensor
from hyperlora.encoders.identity_similarity import IdentitySimilarity
from hyperlora.service.engine.batcher import BatchSpec
from hyperlora.service.engine.requests import EngineResult, SimilarityRequest
from hyperlora.service.engine.worker import ModelWorker


@dataclass(frozen=True)
class SimilarityItem:
    """Pixels to compare: ``photos`` and ``images``, each [n, 3, size, size] in [0, 1]."""

    photos: Tensor
    images: Tensor


async def compute_similarity(
    identity_similarity: IdentitySimilarity,
    request: SimilarityRequest,
    worker: ModelWorker,
    timeout_s: float,
) -> EngineResult[list[float]]:
    """Compute the identity similarity of images to photos of one subject.

    Args:
        identity_similarity: The evaluator.
        request: Photos and images.
        worker: Runs the evaluator and the decoders.
        timeout_s: Seconds that the request may wait in the queue.

    Returns:
        One score per image: 0 for anyone, 1 for another photo of the subject.
    """
    to_square = partial(to_tensor, size=identity_similarity.image_size)
    photos = torch.stack(await worker.prepare_each(request.photos, to_square))
    images = torch.stack(await worker.prepare_each(request.images, to_square))
    spec = BatchSpec(
        "identity-similarity", partial(_compute_batch, identity_similarity), max_batch_size=8
    )
    item = SimilarityItem(photos, images)
    return EngineResult(await worker.run_in_batch(spec, item, timeout_s))


def _compute_batch(
    identity_similarity: IdentitySimilarity, items: list[SimilarityItem]
) -> list[list[float]]:
    return [identity_similarity(item.photos, item.images).tolist() for item in items]
