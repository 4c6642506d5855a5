"""Build the pending chunks of a plan on a Ray cluster: workers fit, only this process writes.

A chunk depends on the plan alone. Ray repeats a chunk whose worker or node dies, and finished
chunks are never built twice. Every node needs hyperlora installed and access to the base model. A
folder of photos needs the same path on every node.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Final

from torch import Tensor

from data_builder.build.chunk_store import ChunkResult, build_pending_chunks
from data_builder.build.plan import Plan
from data_builder.build.run import load_class_latents
from data_builder.build.trainer import ChunkTrainer, load_recipe_base
from hyperlora.errors import HyperloraError
from hyperlora.ray_connection import compute_worker_gpus, connect_ray

MAX_RETRIES: Final = 16
"""How often a chunk is repeated when its worker or node dies."""
_trainers: dict[str, ChunkTrainer] = {}
"""Trainer of the last plan of this worker, by fingerprint: a process loads the base model once."""


def run_build_on_ray(folder: Path, address: str = "local", device: str = "auto") -> int:
    """Do what ``run_build`` does, with the workers of a Ray cluster.

    Args:
        folder: Folder of the build, with a plan.
        address: Address of the cluster, or ``local`` for the cluster that this process is
            connected to, or else this machine alone.
        device: As ``ComputeConfig`` takes it. With another than the CPU each worker reserves a GPU,
            where the cluster has any.

    Returns:
        Number of planned LoRAs in the chunks that were built.

    Raises:
        InvalidArgumentError: If Ray is missing, the cluster does not answer, ``folder`` holds no
            plan, or another run works in it.
    """
    ray = connect_ray(address)

    def build_chunks(plan: Plan, pending: Sequence[int]) -> Iterator[ChunkResult]:
        class_latents = None
        if plan.recipe.num_class_images:
            base = load_recipe_base(plan.recipe, device)
            class_latents = load_class_latents(plan, base, folder)
            class_latents = None if class_latents is None else class_latents.cpu()
        return _stream_results(ray, plan, class_latents, pending, device)

    return build_pending_chunks(folder, build_chunks)


def fit_chunk(
    plan: Plan, class_latents: Tensor | None, number: int, device: str = "auto"
) -> ChunkResult:
    """Build one chunk in a worker.

    Args:
        plan: Plan of the build.
        class_latents: Latents of the class images [n, c, h, w], if the recipe has any.
        number: Number of the chunk.
        device: As ``ComputeConfig`` takes it.

    Returns:
        The shard and the time it took.
    """
    start_time = time.perf_counter()
    if plan.fingerprint not in _trainers:
        _trainers.clear()
        base = load_recipe_base(plan.recipe, device)
        if class_latents is not None:
            class_latents = class_latents.to(base.device)
        _trainers[plan.fingerprint] = ChunkTrainer(plan, base, class_latents)
    shard = _trainers[plan.fingerprint].build_chunk(number)
    return ChunkResult(number, shard, time.perf_counter() - start_time)


def _stream_results(
    ray: ModuleType,
    plan: Plan,
    class_latents: Tensor | None,
    pending: Sequence[int],
    device: str,
) -> Iterator[ChunkResult]:
    """Submit all chunks and yield each when it is done; the first error cancels the others."""
    num_gpus = compute_worker_gpus(ray, device)
    remote_fit = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=MAX_RETRIES)(fit_chunk)
    plan_ref, latents_ref = ray.put(plan), ray.put(class_latents)
    pending_refs = [remote_fit.remote(plan_ref, latents_ref, number, device) for number in pending]
    while pending_refs:
        ready, pending_refs = ray.wait(pending_refs)
        try:
            result: ChunkResult = ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            for ref in pending_refs:
                ray.cancel(ref)
            if isinstance(error.cause, HyperloraError):
                raise error.cause from None
            raise
        yield result
