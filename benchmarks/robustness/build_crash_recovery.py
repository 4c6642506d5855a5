"""Kill a build again and again (SIGKILL, at random moments): is anything lost, done twice, or different in the end?

    python benchmarks/killing.py [--subjects 208] [--kills 20] [--folder FOLDER] [--fork]

Builds the same plan twice on a tiny Stable Diffusion, once undisturbed and once killed, each in processes of their own,
and compares the chunks byte for byte and the rows one by one. The base is random: what is tested is the bookkeeping.
With ``--fork`` the processes begin with everything imported, so that kills hit work and not Python's imports.
"""

import argparse
import os
import random
import signal
import string
import tempfile
import time
from collections import Counter
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from data_builder.build.chunk_store import ChunkStore
from data_builder.build.make_plan import make_plan
from data_builder.build.plan import Plan, Recipe, write_plan
from data_builder.build.run import run_build
from data_builder.sources.sources import AvatarSource
from hyperlora.data.lora_dataset import LoraDataset


def build_tiny_base(folder: Path) -> Path:
    """A Stable Diffusion 1 pipeline of the real classes: 8x8 latents, 16x16 pixels."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    characters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    tokens = [
        *characters,
        *(f"{letter}</w>" for letter in characters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    tokenizer = CLIPTokenizer(
        vocab={word: i for i, word in enumerate(tokens)}, merges=[], model_max_length=77
    )
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
    )
    pipe = StableDiffusionPipeline(
        vae,
        CLIPTextModel(text),
        tokenizer,
        unet,
        DDIMScheduler(),
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def start_build(build: Path, fork: bool) -> BaseProcess:
    """A process that runs the build, with its output thrown away."""
    process = get_context("fork" if fork else "spawn").Process(
        target=_run_build_silently, args=(build,)
    )
    process.start()
    return process


def _run_build_silently(build: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    run_build(build)


def run_with_kills(
    plan: Plan, build: Path, kills: int, max_pause_s: float, fork: bool
) -> tuple[int, list[int]]:
    """How many kills hit a living run, and the chunks that were finished at each; each kill comes up to ``max_pause_s``
    seconds after a random chunk."""
    rng, chunks, finished, num_kills = random.Random(0), ChunkStore(plan, build), list[int](), 0
    share = max(1, plan.num_chunks // (kills + 1))
    while num_kills < kills:
        child, target_chunks = (
            start_build(build, fork),
            min(
                len(chunks.list_finished_chunks()) + rng.randint(0, 2 * share), plan.num_chunks - 1
            ),
        )
        while child.is_alive() and len(chunks.list_finished_chunks()) < target_chunks:
            time.sleep(0.01)
        time.sleep(
            rng.uniform(0, max_pause_s)
        )  # in the middle of whatever comes next: loading, fitting, writing
        if child.is_alive() and child.pid:
            os.kill(child.pid, signal.SIGKILL)
            num_kills += 1
        child.join()
        finished.append(len(chunks.list_finished_chunks()))
        if not chunks.list_pending_chunks():
            break
    return num_kills, finished


def run_to_completion(build: Path, fork: bool) -> None:
    child = start_build(build, fork)
    child.join()
    if child.exitcode:
        raise SystemExit(f"the build in {build} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, default=208)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--fork", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    recipe = Recipe(
        str(build_tiny_base(folder / "base")),
        preset="attention",
        rank=2,
        finetune_steps=4,
        subjects_per_batch=4,
        eval_every=4,
    )
    plan = make_plan(
        AvatarSource(0, arguments.subjects, portraits_per_identity=1, resolution=16), recipe
    )
    for name in ("whole", "killed"):
        write_plan(plan, folder / name)
    start_time = time.perf_counter()
    run_to_completion(folder / "whole", arguments.fork)
    seconds = time.perf_counter() - start_time
    print(f"undisturbed: {len(plan.rows)} LoRAs in {seconds:.0f} s")
    num_kills, finished = run_with_kills(
        plan, folder / "killed", arguments.kills, 1.5 * seconds / plan.num_chunks, arguments.fork
    )
    print(f"{num_kills} kills, chunks finished at each (of {plan.num_chunks}): {finished}")
    run_to_completion(folder / "killed", arguments.fork)
    expected, actual = (LoraDataset(folder / name) for name in ("whole", "killed"))
    duplicates = [
        who
        for who, n in Counter((r.subject, r.repetition) for r in actual.records).items()
        if n > 1
    ]
    lost = {r.subject for r in expected.records} ^ {r.subject for r in actual.records}
    num_identical = sum(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    num_identical_files = sum(
        (folder / "killed" / "chunks" / f.name).read_bytes() == f.read_bytes()
        for f in (folder / "whole" / "chunks").glob("*.safetensors")
    )
    partial_files = list((folder / "killed" / "chunks").glob(".*"))
    print(
        f"lost {len(lost)}, twice {len(duplicates)}, half-written files left {len(partial_files)}, rows identical {num_identical} of "
        f"{len(expected)}, chunk files identical byte for byte {num_identical_files} of {plan.num_chunks}"
    )


if __name__ == "__main__":
    main()
