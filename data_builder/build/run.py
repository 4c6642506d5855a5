"""Build the pending chunks of a plan in this process."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from torch import Tensor

from data_builder.build.chunk_store import ChunkResult, build_pending_chunks
from data_builder.build.plan import Plan
from data_builder.build.subject_data import sample_class_latents
from data_builder.build.trainer import ChunkTrainer, load_recipe_base
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.lora.io.safetensors_file import read_tensors, serialize_tensors, write_bytes

CLASS_LATENTS_FILE: Final = "class.safetensors"


def run_build(folder: Path, device: str = "auto") -> int:
    """Build every pending chunk; a run may be killed at any moment and started again.

    Args:
        folder: Folder of the build, with a plan.
        device: As ``ComputeConfig`` takes it.

    Returns:
        Number of planned LoRAs in the chunks that were built.

    Raises:
        InvalidArgumentError: If ``folder`` holds no plan, or another run works in it.
    """

    def build_chunks(plan: Plan, pending: Sequence[int]) -> Iterator[ChunkResult]:
        base = load_recipe_base(plan.recipe, device)
        trainer = ChunkTrainer(plan, base, load_class_latents(plan, base, folder))
        for number in pending:
            start_time = time.perf_counter()
            shard = trainer.build_chunk(number)
            yield ChunkResult(number, shard, time.perf_counter() - start_time)

    return build_pending_chunks(folder, build_chunks)


def load_class_latents(plan: Plan, base: DiffusionBase, folder: Path) -> Tensor | None:
    """Load the latents of the class images; they are sampled once per build.

    Args:
        plan: Plan of the build.
        base: Base model that samples the images.
        folder: Folder of the build, where the latents are kept.

    Returns:
        Latents [n, c, h, w] on the device of ``base``; None if the recipe has no class images.
    """
    if not plan.recipe.num_class_images:
        return None
    file = folder / CLASS_LATENTS_FILE
    if not file.is_file():
        latents = sample_class_latents(base, plan.recipe)
        write_bytes(serialize_tensors({"latents": latents}, {"plan": plan.fingerprint}), file)
    tensors, _ = read_tensors(file, CLASS_LATENTS_FILE)
    return tensors["latents"].to(base.device)
