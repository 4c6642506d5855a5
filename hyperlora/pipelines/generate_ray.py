"""Photos to LoRAs on a Ray cluster, through Ray Data: each worker holds the model, this process writes the files."""

import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from hyperlora.data.subjects import Subject
from hyperlora.pipelines.generate import GenerationConfig, GenerationRecord
from hyperlora.pipelines.generate_folder import BatchGenerator, generate_batch
from hyperlora.ray_connection import connect_ray


def make_ray_batch_generator(
    address: str, model_name_or_path: str, base_name_or_path: str | None, config: GenerationConfig
) -> BatchGenerator:
    """A maker for ``generate_folder`` whose batches go to the workers of the cluster at ``address`` ("local": this
    machine, or the cluster this process is connected to). ``model_name_or_path`` and ``base_name_or_path`` are names every node can load, and the
    photos lie under the same paths everywhere. Raises ``InvalidArgumentError`` without the extra or if nobody answers."""
    ray = connect_ray(address)

    def generate_batches(
        batches: Sequence[list[Subject]],
    ) -> Iterator[list[tuple[GenerationRecord, bytes]]]:
        if not batches:
            return
        import ray.data as data

        data.DataContext.get_current().enable_progress_bars = False
        num_gpus = 1 if ray.cluster_resources().get("GPU") else 0
        num_workers = max(
            1,
            int(ray.cluster_resources().get("GPU" if num_gpus else "CPU", 1))
            - (0 if num_gpus else 1),
        )
        dataset = data.from_items([{"subjects": pickle.dumps(batch)} for batch in batches])
        outputs = dataset.map_batches(
            _Worker,
            batch_size=1,
            fn_constructor_args=(model_name_or_path, base_name_or_path, config),
            num_cpus=0 if num_gpus else 1,
            num_gpus=num_gpus,
            compute=data.ActorPoolStrategy(min_size=1, max_size=min(num_workers, len(batches))),
        )
        for row in outputs.iter_rows():
            records, file_contents = json.loads(row["made"]), pickle.loads(row["files"])
            yield [
                (GenerationRecord(**record), file_bytes)
                for record, file_bytes in zip(records, file_contents, strict=True)
            ]

    return generate_batches


class _Worker:
    """Holds the model in one process of the cluster."""

    def __init__(
        self, model_name_or_path: str, base_name_or_path: str | None, config: GenerationConfig
    ) -> None:
        from hyperlora.diffusion.diffusion_base import load_diffusion_base
        from hyperlora.pipelines.auto import load_image_to_lora

        self.base = load_diffusion_base(base_name_or_path) if base_name_or_path else None
        self.model = load_image_to_lora(model_name_or_path, base=self.base)
        self.config = config

    def __call__(self, batch: Any) -> Any:
        results = generate_batch(
            self.model, pickle.loads(batch["subjects"][0]), self.config, self.base
        )
        records_json = json.dumps([asdict(record) for record, _ in results])
        return {
            "made": [records_json],
            "files": [pickle.dumps([file_bytes for _, file_bytes in results])],
        }
