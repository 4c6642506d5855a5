"""Do the chunks that are left, here."""

import time
from pathlib import Path

from torch import Tensor

from data_builder.build.chunk_store import Chunks, alone
from data_builder.build.plan import Plan, read_plan
from data_builder.build.subject_data import class_latents
from data_builder.build.trainer import Farm, open_base
from hyperlora.diffusion.diffusion_base import Base
from hyperlora.lora.io.safetensors_file import encoded, read_tensors, write_bytes
from hyperlora.progress import track

CLASS = "class.safetensors"


def run(folder: Path) -> int:
    """Fit every chunk that is not finished; how many LoRAs were made. May be killed at any moment and begun again.

    Raises ``BadRequest`` without a plan, and while another run is at work in ``folder``.
    """
    chunks = Chunks(read_plan(folder), folder)
    with alone(folder):
        chunks.check()
        left = chunks.left()
        if not left:
            return 0
        base = open_base(chunks.plan.recipe)
        farm = Farm(chunks.plan, base, class_pictures(chunks.plan, base, folder))
        k, total = chunks.plan.recipe.at_once, len(chunks.plan.rows)
        done = total - sum(len(chunks.plan.chunk(n)) for n in left)
        for number in track(left, "fitting", "LoRAs", total, k, per="hour", done=done):
            began = time.perf_counter()
            chunks.write(number, farm.chunk(number), time.perf_counter() - began)
        return total - done


def class_pictures(plan: Plan, base: Base, folder: Path) -> Tensor | None:
    """The latents of the class pictures, drawn once per build; None where none are asked for."""
    if not plan.recipe.prior_images:
        return None
    file = folder / CLASS
    if not file.is_file():
        latents = class_latents(base, plan.recipe)
        write_bytes(encoded({"latents": latents}, {"plan": plan.digest}), file)
    tensors, _ = read_tensors(file, CLASS)
    return tensors["latents"].to(base.pipeline.device)
