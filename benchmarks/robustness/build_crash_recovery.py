"""SIGKILL at random moments of a dataset build: rows lost, duplicated, or different in the end.

    python -m benchmarks.robustness.build_crash_recovery [--num-subjects 208] [--num-kills 20]
        [--folder FOLDER] [--fork]

The same plan is built twice on a tiny Stable Diffusion, once undisturbed and once with kills, each
in processes of its own. Chunks are compared byte by byte and rows one by one. The base model is
random, since only the bookkeeping is tested. With ``--fork`` processes start with everything
imported, so that kills hit work and not imports.
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
    """Save a tiny Stable Diffusion 1 pipeline of the real classes (8x8 latents) in ``folder``."""
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
    """Start a process that runs the build, without its output.

    Args:
        build: Folder of the build.
        fork: Whether to fork this process, or else to start a new interpreter.

    Returns:
        The process.
    """
    process = get_context("fork" if fork else "spawn").Process(
        target=_run_build_silently, args=(build,)
    )
    process.start()
    return process


def _run_build_silently(build: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    run_build(build)


def run_with_kills(
    plan: Plan, build: Path, max_kills: int, max_pause_s: float, fork: bool
) -> tuple[int, list[int]]:
    """Start a build again and again, and kill each run some time after a random chunk.

    Args:
        plan: Plan of the build.
        build: Folder of the build.
        max_kills: Kills of living runs after which to stop.
        max_pause_s: Largest pause between the chunk and the kill in seconds.
        fork: Whether to fork this process, or else to start a new interpreter.

    Returns:
        Number of kills that hit a living run, and the finished chunks at each.
    """
    rng, store = random.Random(0), ChunkStore(plan, build)
    num_finished, num_kills = list[int](), 0
    chunks_per_run = max(1, plan.num_chunks // (max_kills + 1))
    while num_kills < max_kills:
        process = start_build(build, fork)
        num_target = len(store.list_finished_chunks()) + rng.randint(0, 2 * chunks_per_run)
        num_target = min(num_target, plan.num_chunks - 1)
        while process.is_alive() and len(store.list_finished_chunks()) < num_target:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, max_pause_s))  # in the middle of loading, fitting or writing
        if process.is_alive() and process.pid:
            os.kill(process.pid, signal.SIGKILL)
            num_kills += 1
        process.join()
        num_finished.append(len(store.list_finished_chunks()))
        if not store.list_pending_chunks():
            break
    return num_kills, num_finished


def run_to_completion(build: Path, fork: bool) -> None:
    """Run a build to its end.

    Args:
        build: Folder of the build.
        fork: Whether to fork this process, or else to start a new interpreter.

    Raises:
        SystemExit: If the build fails.
    """
    process = start_build(build, fork)
    process.join()
    if process.exitcode:
        raise SystemExit(f"the build in {build} failed")


def compare_builds(whole: Path, killed: Path) -> str:
    """Compare two builds of the same plan.

    Args:
        whole: Build that ran undisturbed.
        killed: Build that was killed.

    Returns:
        A line of figures.
    """
    expected, actual = LoraDataset(whole), LoraDataset(killed)
    counts = Counter((record.subject, record.repetition) for record in actual.records)
    num_duplicates = sum(count > 1 for count in counts.values())
    subjects = [{record.subject for record in data.records} for data in (expected, actual)]
    num_lost = len(subjects[0] ^ subjects[1])
    num_identical = sum(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    chunk_files = list((whole / "chunks").glob("*.safetensors"))
    num_identical_files = sum(
        (killed / "chunks" / file.name).read_bytes() == file.read_bytes() for file in chunk_files
    )
    num_partial_files = len(list((killed / "chunks").glob(".*")))
    return (
        f"lost {num_lost}, duplicates {num_duplicates}, half-written files {num_partial_files}, "
        f"identical rows {num_identical} of {len(expected)}, "
        f"identical chunk files {num_identical_files} of {len(chunk_files)}"
    )


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-subjects", type=int, default=208)
    parser.add_argument("--num-kills", type=int, default=20)
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
        AvatarSource(0, arguments.num_subjects, portraits_per_identity=1, resolution=16), recipe
    )
    whole, killed = folder / "whole", folder / "killed"
    for build in (whole, killed):
        write_plan(plan, build)
    start_time = time.perf_counter()
    run_to_completion(whole, arguments.fork)
    seconds = time.perf_counter() - start_time
    print(f"undisturbed: {len(plan.rows)} LoRAs in {seconds:.0f} s")
    max_pause_s = 1.5 * seconds / plan.num_chunks
    num_kills, num_finished = run_with_kills(
        plan, killed, arguments.num_kills, max_pause_s, arguments.fork
    )
    print(f"{num_kills} kills, finished chunks at each (of {plan.num_chunks}): {num_finished}")
    run_to_completion(killed, arguments.fork)
    print(compare_builds(whole, killed))


if __name__ == "__main__":
    main()
