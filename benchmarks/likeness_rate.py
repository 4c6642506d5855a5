"""LoRAs per hour *to equal likeness*, against PEFT from scratch one after another, and what each part contributes.

    python -m data_builder benchmark -o runs/data/benchmark-validation --split validation --people 16
    python benchmarks/likeness_rate.py runs/data/benchmark-validation [--people 6] [--dataset runs/avatars/build]

Every way fits the same sites, rank, photos (half of a subject's; the others are what likeness is measured against),
batch and optimiser. Likeness is the I of pictures of prompts; that of the best fit from scratch is what all must
reach. Seconds per step are of all ways in turn: with PEFT, photos and prompt encoded at every step as training scripts
do; the same encoded once; and all subjects at once.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from fitting import at_once, one_by_one
from torch import Tensor

from hyperlora import pretrained
from hyperlora.cpu import keep_heap
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.diffusion.diffusion_base import Base, load_base
from hyperlora.encoders.attribute_classifier import Reader
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.subject_evaluator import Judge, Row
from hyperlora.finetuning.examples import Examples
from hyperlora.finetuning.refine import photo_examples
from hyperlora.finetuning.trainer import fit
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora import ImageToLora

PROMPT = "a portrait of sks person"


def likeness(
    judge: Judge, name: str, start: LoraWeights, examples: Examples, snapshots: list[int], lr: float, batch: int
) -> list[tuple[int, Row]]:
    """The scores after as many steps as ``snapshots`` say (0 is the start)."""
    rows = [(0, judge.row(f"{name}, 0 steps", start))] if 0 in snapshots else []
    wanted = [n for n in snapshots if n]
    if wanted:
        expand = partial(LoraWeights.unflatten, start.layout)
        done = fit(
            judge.base.denoiser, judge.base.noise_schedule, examples, start.flatten(), expand, steps=max(wanted), lr=lr,
            batch=batch, snapshots=wanted, label=name,
        )  # fmt: skip
        rows += [(n, judge.row(f"{name}, {n} steps", done.snapshots[n])) for n in wanted]
    for _, row in rows:
        print(f"{row.name}: I {row.identity}, P {row.prompt}", flush=True)
    return rows


def seconds_per_step(base: Base, photos: Tensor, start: LoraWeights, steps: int, batch: int) -> dict[str, float]:
    """Of one subject, by way."""
    examples = photo_examples(base, photos, PROMPT)

    def encoded(subject: int) -> Examples:
        return photo_examples(base, photos[subject : subject + 1, torch.randperm(photos.shape[1])[:batch]], PROMPT)

    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "PEFT, one by one, encoding at every step": lambda: one_by_one(base, examples, start, steps, batch, encoded),
        "PEFT, one by one, encoded once": lambda: one_by_one(base, examples, start, steps, batch),
        "all at once": lambda: at_once(base, examples, start, steps, batch),
    }
    return {name: way()[0] / steps for name, way in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("--dataset", type=Path, help="Of LoRAs, whose mean is tried as a start too.")
    parser.add_argument("--people", type=int, default=6)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200, 400], help="From scratch.")
    parser.add_argument("--warm-steps", type=int, nargs="+", default=[0, 12, 48], help="From the mean or the network.")
    parser.add_argument("--timed", type=int, default=12, help="Steps that are timed.")
    arguments = parser.parse_args()
    keep_heap()
    torch.manual_seed(0)
    base = load_base(pretrained.BASE)
    network = ImageToLora.from_pretrained(pretrained.MODEL, base=base)
    benchmark = load_benchmark(arguments.benchmark, base.resolution, arguments.people)
    judge = Judge(base, Reader.from_pretrained(pretrained.EVALUATOR), benchmark, steps=12)
    photos, n = benchmark.photos, len(benchmark.names)
    examples = photo_examples(base, photos, PROMPT)
    random = LoraWeights.zeros(network.layout, (n,), 0.05)
    try_from = partial(likeness, judge, examples=examples, batch=arguments.batch)

    scratch = try_from("from scratch", random, snapshots=arguments.steps, lr=arguments.lr)
    steps_needed, best = max(scratch, key=lambda found: found[1].identity.mean)
    with torch.no_grad():
        warm = {"the network's prediction": network.forward(photos)}
        began = time.perf_counter()
        network.forward(photos[:1])
        predicting = time.perf_counter() - began
    if arguments.dataset:
        data = LoraDataset(arguments.dataset, "train")
        mean = data.lora(range(0, len(data), max(1, len(data) // 128))).mean()
        warm["the mean LoRA"] = LoraWeights.unflatten(mean.layout, mean.flatten().expand(n, -1))
    needed: dict[str, float] = {}
    for name, start in warm.items():
        for steps, row in try_from(name, start, snapshots=arguments.warm_steps, lr=arguments.lr / 3):
            if row.identity.mean >= best.identity.mean:
                needed.setdefault(name, steps)
    costs = seconds_per_step(base, photos, random, arguments.timed, arguments.batch)
    print(f"\nto I {best.identity} ({best.name}, P {best.prompt})\n\n| way | steps | seconds | LoRAs/hour | ratio |")
    print("|---" * 5 + "|")
    ways = [(name, steps_needed, cost * steps_needed) for name, cost in costs.items()]
    ways += [(f"all at once, from {k}", s, costs["all at once"] * s + predicting) for k, s in needed.items()]
    for name, steps, seconds in ways:
        print(f"| {name} | {steps} | {seconds:.2f} | {3600 / seconds:,.0f} | {ways[0][2] / seconds:,.1f} |")


if __name__ == "__main__":
    main()
