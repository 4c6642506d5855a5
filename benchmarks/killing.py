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

from data_builder.build.chunk_store import Chunks
from data_builder.build.make_plan import make_plan
from data_builder.build.plan import Plan, Recipe, write_plan
from data_builder.build.run import run
from data_builder.sources.sources import Avatars
from hyperlora.data.lora_dataset import LoraDataset


def tiny_base(folder: Path) -> Path:
    """A Stable Diffusion 1 pipeline of the real classes: 8x8 latents, 16x16 pixels."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    text = CLIPTextConfig(vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                          num_attention_heads=2, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1)  # fmt: skip
    pipe = StableDiffusionPipeline(vae, CLIPTextModel(text), tokenizer, unet, DDIMScheduler(), None, None,
                                   requires_safety_checker=False)  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def start(build: Path, fork: bool) -> BaseProcess:
    """A process that runs the build, with its output thrown away."""
    made = get_context("fork" if fork else "spawn").Process(target=_run_quietly, args=(build,))
    made.start()
    return made


def _run_quietly(build: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    run(build)


def killed_build(plan: Plan, build: Path, kills: int, pause: float, fork: bool) -> tuple[int, list[int]]:
    """How many kills hit a living run, and the chunks that were finished at each; each kill comes up to ``pause``
    seconds after a random chunk."""
    draw, chunks, finished, hit = random.Random(0), Chunks(plan, build), list[int](), 0
    share = max(1, plan.chunks // (kills + 1))
    while hit < kills:
        child, target = start(build, fork), min(len(chunks.done()) + draw.randint(0, 2 * share), plan.chunks - 1)
        while child.is_alive() and len(chunks.done()) < target:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, pause))  # in the middle of whatever comes next: loading, fitting, writing
        if child.is_alive() and child.pid:
            os.kill(child.pid, signal.SIGKILL)
            hit += 1
        child.join()
        finished.append(len(chunks.done()))
        if not chunks.left():
            break
    return hit, finished


def finish(build: Path, fork: bool) -> None:
    child = start(build, fork)
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
    recipe = Recipe(str(tiny_base(folder / "base")), preset="attention", rank=2, steps=4, at_once=4, every=4)
    plan = make_plan(Avatars(0, arguments.subjects, each=1, size=16), recipe)
    for name in ("whole", "killed"):
        write_plan(plan, folder / name)
    began = time.perf_counter()
    finish(folder / "whole", arguments.fork)
    seconds = time.perf_counter() - began
    print(f"undisturbed: {len(plan.rows)} LoRAs in {seconds:.0f} s")
    hit, finished = killed_build(plan, folder / "killed", arguments.kills, 1.5 * seconds / plan.chunks, arguments.fork)
    print(f"{hit} kills, chunks finished at each (of {plan.chunks}): {finished}")
    finish(folder / "killed", arguments.fork)
    one, other = (LoraDataset(folder / name) for name in ("whole", "killed"))
    twice = [who for who, n in Counter((r.subject, r.view) for r in other.records).items() if n > 1]
    lost = {r.subject for r in one.records} ^ {r.subject for r in other.records}
    same = sum(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    files = sum(
        (folder / "killed" / "chunks" / f.name).read_bytes() == f.read_bytes()
        for f in (folder / "whole" / "chunks").glob("*.safetensors")
    )
    left = list((folder / "killed" / "chunks").glob(".*"))
    print(f"lost {len(lost)}, twice {len(twice)}, half-written files left {len(left)}, rows identical {same} of "
          f"{len(one)}, chunk files identical byte for byte {files} of {plan.chunks}")  # fmt: skip


if __name__ == "__main__":
    main()
