"""The same chunks on a Ray cluster: workers fit, this process alone writes.

A chunk depends on the plan only, so one that died with its worker or node is simply done again by Ray, and what was
finished before is never done twice. Every node needs hyperlora installed, the base within reach, and (for a folder of
photos) the folder under the same path.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from data_builder.build.chunk_store import ChunkStore, lock_build
from data_builder.build.plan import Plan, read_plan
from hyperlora.errors import HyperloraError
from hyperlora.progress import track
from hyperlora.ray_connection import connect_ray

MAX_RETRIES: Final = 16
"""How often a chunk is begun again when its worker or node dies."""
_trainers: dict[str, Any] = {}
"""The farm of this worker's last plan: the base is loaded once per process."""


def run_build_on_ray(folder: Path, address: str = "local") -> int:
    """``running.run`` with the chunks done by the workers of a cluster: of ``address``, of the one this process is
    already connected to, or of this machine alone ("local").

    Raises ``InvalidArgumentError`` without Ray, without a plan, or if the cluster does not answer.
    """
    ray = connect_ray(address)
    store = ChunkStore(read_plan(folder), folder)
    with lock_build(folder):
        store.check_finished_chunks()
        pending, plan = store.list_pending_chunks(), store.plan
        if not pending:
            return 0
        subjects_per_batch, total = plan.recipe.subjects_per_batch, len(plan.rows)
        num_finished = total - sum(len(plan.get_chunk(number)) for number in pending)
        results = _stream_results(ray, plan, _load_class_latents(plan, folder), pending)
        for number, shard, seconds in track(
            results,
            "fitting",
            "LoRAs",
            total,
            subjects_per_batch,
            time_unit="hour",
            completed=num_finished,
        ):
            store.write_chunk(number, shard, seconds)
        return total - num_finished


def fit_chunk(plan: Plan, class_latents: Any, number: int) -> tuple[int, bytes, float]:
    """(``format_score``, its shard, seconds): what a worker does."""
    from data_builder.build.trainer import ChunkTrainer, load_recipe_base

    start_time = time.perf_counter()
    if plan.fingerprint not in _trainers:
        _trainers.clear()
        base = load_recipe_base(plan.recipe)
        _trainers[plan.fingerprint] = ChunkTrainer(
            plan, base, None if class_latents is None else class_latents.to(base.pipeline.device)
        )
    return number, _trainers[plan.fingerprint].chunk(number), time.perf_counter() - start_time


def _stream_results(
    ray: Any, plan: Plan, class_latents: Any, pending: list[int]
) -> Iterator[tuple[int, bytes, float]]:
    num_gpus = 1 if ray.cluster_resources().get("GPU") else 0
    remote_fit = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=MAX_RETRIES)(fit_chunk)
    plan_ref, latents_ref = ray.put(plan), ray.put(class_latents)
    pending_refs = [remote_fit.remote(plan_ref, latents_ref, number) for number in pending]
    while pending_refs:
        ready, pending_refs = ray.wait(pending_refs)
        try:
            result: tuple[int, bytes, float] = ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            for ref in pending_refs:
                ray.cancel(ref)
            if isinstance(error.cause, HyperloraError):
                raise error.cause from None
            raise
        yield result


def _load_class_latents(plan: Plan, folder: Path) -> Any:
    if not plan.recipe.num_class_images:
        return None
    from data_builder.build.run import load_class_latents
    from data_builder.build.trainer import load_recipe_base

    latents = load_class_latents(plan, load_recipe_base(plan.recipe), folder)
    return None if latents is None else latents.cpu()
