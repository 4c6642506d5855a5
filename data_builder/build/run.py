"""Do the chunks that are left, here."""

import time
from pathlib import Path

from torch import Tensor

from data_builder.build.chunk_store import ChunkStore, lock_build
from data_builder.build.plan import Plan, read_plan
from data_builder.build.subject_data import sample_class_latents
from data_builder.build.trainer import ChunkTrainer, load_recipe_base
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.lora.io.safetensors_file import read_tensors, serialize_tensors, write_bytes
from hyperlora.progress import track

CLASS_LATENTS_FILE = "class.safetensors"


def run_build(folder: Path) -> int:
    """Fit every chunk that is not finished; how many LoRAs were made. May be killed at any moment and begun again.

    Raises ``InvalidArgumentError`` without a plan, and while another run is at work in ``folder``.
    """
    store = ChunkStore(read_plan(folder), folder)
    with lock_build(folder):
        store.check_finished_chunks()
        pending = store.list_pending_chunks()
        if not pending:
            return 0
        base = load_recipe_base(store.plan.recipe)
        trainer = ChunkTrainer(store.plan, base, load_class_latents(store.plan, base, folder))
        subjects_per_batch, total = store.plan.recipe.subjects_per_batch, len(store.plan.rows)
        num_finished = total - sum(len(store.plan.get_chunk(n)) for n in pending)
        for number in track(
            pending,
            "fitting",
            "LoRAs",
            total,
            subjects_per_batch,
            time_unit="hour",
            completed=num_finished,
        ):
            start_time = time.perf_counter()
            store.write_chunk(number, trainer.build_chunk(number), time.perf_counter() - start_time)
        return total - num_finished


def load_class_latents(plan: Plan, base: DiffusionBase, folder: Path) -> Tensor | None:
    """The latents of the class pictures, drawn once per build; None where none are asked for."""
    if not plan.recipe.num_class_images:
        return None
    file = folder / CLASS_LATENTS_FILE
    if not file.is_file():
        latents = sample_class_latents(base, plan.recipe)
        write_bytes(serialize_tensors({"latents": latents}, {"plan": plan.fingerprint}), file)
    tensors, _ = read_tensors(file, CLASS_LATENTS_FILE)
    return tensors["latents"].to(base.pipeline.device)
