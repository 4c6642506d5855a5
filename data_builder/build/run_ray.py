"""The same chunks on a Ray cluster: workers fit, this process alone writes.

A chunk depends on the plan only, so one that died with its worker or node is simply done again by Ray, and what was
finished before is never done twice. Every node needs hyperlora installed, the base within reach, and (for a folder of
photos) the folder under the same path.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from data_builder.build.chunk_store import Chunks, alone
from data_builder.build.plan import Plan, read_plan
from hyperlora.errors import HyperloraError
from hyperlora.progress import track
from hyperlora.ray_connection import connected

RETRIES: Final = 16
"""How often a chunk is begun again when its worker or node dies."""
_open: dict[str, Any] = {}
"""The farm of this worker's last plan: the base is loaded once per process."""


def run_on_ray(folder: Path, address: str = "local") -> int:
    """``running.run`` with the chunks done by the workers of a cluster: of ``address``, of the one this process is
    already connected to, or of this machine alone ("local").

    Raises ``BadRequest`` without Ray, without a plan, or if the cluster does not answer.
    """
    ray = connected(address)
    chunks = Chunks(read_plan(folder), folder)
    with alone(folder):
        chunks.check()
        left, plan = chunks.left(), chunks.plan
        if not left:
            return 0
        k, total = plan.recipe.at_once, len(plan.rows)
        done = total - sum(len(plan.chunk(number)) for number in left)
        results = _results(ray, plan, _class_latents(plan, folder), left)
        for number, data, seconds in track(results, "fitting", "LoRAs", total, k, per="hour", done=done):
            chunks.write(number, data, seconds)
        return total - done


def fit_chunk(plan: Plan, latents: Any, number: int) -> tuple[int, bytes, float]:
    """(``number``, its shard, seconds): what a worker does."""
    from data_builder.build.trainer import Farm, open_base

    began = time.perf_counter()
    if plan.digest not in _open:
        _open.clear()
        base = open_base(plan.recipe)
        _open[plan.digest] = Farm(plan, base, None if latents is None else latents.to(base.pipeline.device))
    return number, _open[plan.digest].chunk(number), time.perf_counter() - began


def _results(ray: Any, plan: Plan, latents: Any, left: list[int]) -> Iterator[tuple[int, bytes, float]]:
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(fit_chunk)
    shared, pictures = ray.put(plan), ray.put(latents)
    waiting = [task.remote(shared, pictures, number) for number in left]
    while waiting:
        ready, waiting = ray.wait(waiting)
        try:
            result: tuple[int, bytes, float] = ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            for one in waiting:
                ray.cancel(one)
            if isinstance(error.cause, HyperloraError):
                raise error.cause from None
            raise
        yield result


def _class_latents(plan: Plan, folder: Path) -> Any:
    if not plan.recipe.prior_images:
        return None
    from data_builder.build.run import class_pictures
    from data_builder.build.trainer import open_base

    latents = class_pictures(plan, open_base(plan.recipe), folder)
    return None if latents is None else latents.cpu()
