"""Photos to LoRAs on a Ray cluster: workers hold the model, this process writes the files."""

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hyperlora.compute import ComputeConfig, is_out_of_memory
from hyperlora.data.subjects import Subject
from hyperlora.errors import HyperloraError, OutOfMemoryError
from hyperlora.pipelines.config import GenerationConfig
from hyperlora.pipelines.generate import GenerationRecord
from hyperlora.pipelines.generate_folder import BatchGenerator, FileResult, generate_batch
from hyperlora.pipelines.released.released_model import ReleasedOptions
from hyperlora.ray_connection import compute_worker_gpus, connect_ray


def make_ray_batch_generator(
    address: str,
    model_name_or_path: str,
    base_name_or_path: str | None,
    config: GenerationConfig,
    compute_options: Mapping[str, Any] | None = None,
    released_options: ReleasedOptions | None = None,
) -> BatchGenerator:
    """Make a ``batch_generator`` of ``generate_folder`` that runs on a Ray cluster.

    The photos must have the same paths on every node.

    Args:
        address: The address of the cluster; ``local`` for this machine, or for the cluster that
            this process is connected to.
        model_name_or_path: The model, a name that every node can load.
        base_name_or_path: The base for refinement, likewise; None for none.
        config: The settings.
        compute_options: Arguments of the ``ComputeConfig`` that each worker makes. With another
            device than the CPU it reserves a GPU, where the cluster has any.
        released_options: Where the parts of a network that others released come from, likewise.

    Returns:
        The generator of batches.

    Raises:
        InvalidArgumentError: Ray is not installed or nobody answers, or the settings rerank.
    """
    config.check_folder(use_ray=True)
    ray = connect_ray(address)
    options = dict(compute_options or {})

    def generate_batches(batches: Sequence[Sequence[Subject]]) -> Iterator[Sequence[FileResult]]:
        """Generate batches on the workers of the cluster."""
        if not batches:
            return
        import ray.data as data

        data.DataContext.get_current().enable_progress_bars = False
        resources = ray.cluster_resources()
        num_gpus = compute_worker_gpus(ray, options.get("device", "auto"))
        # one GPU per worker; without GPUs one CPU, and one is left for this process
        num_free = resources["GPU"] if num_gpus else resources.get("CPU", 1) - 1
        num_workers = max(1, int(num_free))
        dataset = data.from_items([{"subjects": pickle.dumps(batch)} for batch in batches])
        outputs = dataset.map_batches(
            _Worker,
            batch_size=1,
            fn_constructor_args=(
                model_name_or_path,
                base_name_or_path,
                config,
                options,
                released_options,
            ),
            num_cpus=0 if num_gpus else 1,
            num_gpus=num_gpus,
            compute=data.ActorPoolStrategy(min_size=1, max_size=min(num_workers, len(batches))),
        )
        for row in outputs.iter_rows():
            if (error := pickle.loads(row["error"])) is not None:
                raise error
            records, file_contents = json.loads(row["records"]), pickle.loads(row["files"])
            yield [
                (GenerationRecord(**record), files)
                for record, files in zip(records, file_contents, strict=True)
            ]

    return generate_batches


class _Worker:
    """The model in one process of the cluster.

    Errors for the user are returned, not raised: Ray tries again after those of a constructor.
    """

    def __init__(
        self,
        model_name_or_path: str,
        base_name_or_path: str | None,
        config: GenerationConfig,
        compute_options: Mapping[str, Any],
        released_options: ReleasedOptions | None = None,
    ) -> None:
        from hyperlora.diffusion.diffusion_base import load_diffusion_base
        from hyperlora.pipelines.auto import load_photo_model

        self.config = config
        self.error: HyperloraError | None = None
        try:
            compute = ComputeConfig(**compute_options)
            self.base = None
            if base_name_or_path:
                self.base = load_diffusion_base(base_name_or_path, compute)
            self.model = load_photo_model(
                model_name_or_path, base=self.base, compute=compute, options=released_options
            )
        except (HyperloraError, RuntimeError, MemoryError) as error:
            self.error = _make_user_error(error)

    def __call__(self, batch: Mapping[str, Sequence[bytes]]) -> Mapping[str, Sequence[object]]:
        """Generate one batch of pickled subjects: records as JSON, pickled files and error."""
        results, error = list[FileResult](), self.error
        if error is None:
            try:
                subjects = pickle.loads(batch["subjects"][0])
                results = generate_batch(self.model, subjects, self.config, self.base)
            except (HyperloraError, RuntimeError, MemoryError) as batch_error:
                error = _make_user_error(batch_error)
        return {
            "records": [json.dumps([asdict(record) for record, _ in results])],
            "files": [pickle.dumps([files for _, files in results])],
            "error": [pickle.dumps(error)],
        }


def _make_user_error(error: Exception) -> HyperloraError:
    """Return an error that a user can solve; raise any other again."""
    if isinstance(error, HyperloraError):
        return error.with_traceback(None)
    if not is_out_of_memory(error):
        raise error
    return OutOfMemoryError("a worker ran out of memory: try a smaller --batch-size")
