"""Photos to LoRAs on a Ray cluster, through Ray Data: each worker holds the model, this process writes the files."""

import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from hyperlora.data.subjects import Subject
from hyperlora.pipelines.generate import Made, Settings
from hyperlora.pipelines.generate_folder import Maker, make_batch
from hyperlora.ray_connection import connected


def on_ray(address: str, model: str, base: str | None, settings: Settings) -> Maker:
    """A maker for ``generate_folder`` whose batches go to the workers of the cluster at ``address`` ("local": this
    machine, or the cluster this process is connected to). ``model`` and ``base`` are names every node can load, and the
    photos lie under the same paths everywhere. Raises ``BadRequest`` without the extra or if nobody answers."""
    ray = connected(address)

    def make(batches: Sequence[list[Subject]]) -> Iterator[list[tuple[Made, bytes]]]:
        if not batches:
            return
        import ray.data as data

        data.DataContext.get_current().enable_progress_bars = False
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        workers = max(1, int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1)) - (0 if gpus else 1))
        rows = data.from_items([{"subjects": pickle.dumps(batch)} for batch in batches])
        made = rows.map_batches(
            _Worker, batch_size=1, fn_constructor_args=(model, base, settings), num_cpus=0 if gpus else 1,
            num_gpus=gpus, compute=data.ActorPoolStrategy(min_size=1, max_size=min(workers, len(batches))),
        )  # fmt: skip
        for row in made.iter_rows():
            lines, files = json.loads(row["made"]), pickle.loads(row["files"])
            yield [(Made(**line), file) for line, file in zip(lines, files, strict=True)]

    return make


class _Worker:
    """Holds the model in one process of the cluster."""

    def __init__(self, model: str, base: str | None, settings: Settings) -> None:
        from hyperlora.diffusion.diffusion_base import load_base
        from hyperlora.pipelines.auto import open_photo_model

        self.base = load_base(base) if base else None
        self.model = open_photo_model(model, base=self.base)
        self.settings = settings

    def __call__(self, batch: Any) -> Any:
        made = make_batch(self.model, pickle.loads(batch["subjects"][0]), self.settings, self.base)
        lines = json.dumps([asdict(item) for item, _ in made])
        return {"made": [lines], "files": [pickle.dumps([data for _, data in made])]}
