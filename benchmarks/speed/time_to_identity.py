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
from hyperlora.cpu import disable_malloc_trim
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.subject_evaluator import SubjectEvaluator, SubjectResult
from hyperlora.finetuning.config import FineTuneConfig
from hyperlora.finetuning.examples import TrainingExamples
from hyperlora.finetuning.refine import make_photo_examples
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora import ImageToLora

PROMPT = "a portrait of sks person"


def evaluate_identity(
    judge: SubjectEvaluator,
    name: str,
    start: LoraWeights,
    examples: TrainingExamples,
    snapshots: list[int],
    lr: float,
    batch_size: int,
) -> list[tuple[int, SubjectResult]]:
    """The scores after as many steps as ``snapshots`` say (0 is the start)."""
    rows = [(0, judge.evaluate(f"{name}, 0 steps", start))] if 0 in snapshots else []
    fit_steps = [n for n in snapshots if n]
    if fit_steps:
        expand = partial(LoraWeights.unflatten, start.layout)
        result = fine_tune_loras(
            judge.base.denoiser,
            judge.base.noise_scheduler,
            examples,
            start.flatten(),
            expand,
            FineTuneConfig(
                num_steps=max(fit_steps),
                lr=lr,
                batch_size=batch_size,
                snapshot_steps=fit_steps,
                progress_label=name,
            ),
        )
        rows += [(n, judge.evaluate(f"{name}, {n} steps", result.snapshots[n])) for n in fit_steps]
    for _, row in rows:
        print(f"{row.name}: I {row.identity}, P {row.prompt_accuracy}", flush=True)
    return rows


def measure_step_times(
    base: DiffusionBase, photos: Tensor, start: LoraWeights, steps: int, batch_size: int
) -> dict[str, float]:
    """Of one subject, by way."""
    examples = make_photo_examples(base, photos, PROMPT)

    def encode_photos(subject: int) -> TrainingExamples:
        return make_photo_examples(
            base,
            photos[subject : subject + 1, torch.randperm(photos.shape[1])[:batch_size]],
            PROMPT,
        )

    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "PEFT, one by one, encoding at every step": lambda: one_by_one(
            base, examples, start, steps, batch_size, encode_photos
        ),
        "PEFT, one by one, encoded once": lambda: one_by_one(
            base, examples, start, steps, batch_size
        ),
        "all at once": lambda: at_once(base, examples, start, steps, batch_size),
    }
    return {name: way()[0] / steps for name, way in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", type=Path)
    parser.add_argument(
        "--dataset", type=Path, help="Of LoRAs, whose mean is tried as a start too."
    )
    parser.add_argument("--people", type=int, default=6)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[100, 200, 400], help="From scratch."
    )
    parser.add_argument(
        "--warm-steps",
        type=int,
        nargs="+",
        default=[0, 12, 48],
        help="From the mean or the network.",
    )
    parser.add_argument("--timed", type=int, default=12, help="Steps that are timed.")
    arguments = parser.parse_args()
    disable_malloc_trim()
    torch.manual_seed(0)
    base = load_diffusion_base(pretrained.BASE_DIR)
    network = ImageToLora.from_pretrained(pretrained.IMAGE_TO_LORA_DIR, base=base)
    benchmark = load_benchmark(arguments.benchmark, base.resolution, arguments.people)
    judge = SubjectEvaluator(
        base,
        AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR),
        benchmark,
        num_inference_steps=12,
    )
    photos, n = benchmark.photos, len(benchmark.names)
    examples = make_photo_examples(base, photos, PROMPT)
    random = LoraWeights.zeros(network.layout, (n,), 0.05)
    evaluate_from = partial(evaluate_identity, judge, examples=examples, batch_size=arguments.batch)

    scratch = evaluate_from("from scratch", random, snapshots=arguments.steps, lr=arguments.lr)
    steps_needed, best = max(scratch, key=lambda found: found[1].identity.mean)
    with torch.no_grad():
        warm = {"the network's prediction": network.forward(photos)}
        start_time = time.perf_counter()
        network.forward(photos[:1])
        predict_time_s = time.perf_counter() - start_time
    if arguments.dataset:
        data = LoraDataset(arguments.dataset, "train")
        mean = data.get_weights(range(0, len(data), max(1, len(data) // 128))).mean()
        warm["the mean LoRA"] = LoraWeights.unflatten(mean.layout, mean.flatten().expand(n, -1))
    steps_to_target: dict[str, float] = {}
    for name, start in warm.items():
        for steps, row in evaluate_from(
            name, start, snapshots=arguments.warm_steps, lr=arguments.lr / 3
        ):
            if row.identity.mean >= best.identity.mean:
                steps_to_target.setdefault(name, steps)
    costs = measure_step_times(base, photos, random, arguments.timed, arguments.batch)
    print(
        f"\nto I {best.identity} ({best.name}, P {best.prompt_accuracy})\n\n| way | steps | seconds | LoRAs/hour | ratio |"
    )
    print("|---" * 5 + "|")
    ways = [(name, steps_needed, cost * steps_needed) for name, cost in costs.items()]
    ways += [
        (f"all at once, from {k}", s, costs["all at once"] * s + predict_time_s)
        for k, s in steps_to_target.items()
    ]
    for name, steps, seconds in ways:
        print(
            f"| {name} | {steps} | {seconds:.2f} | {3600 / seconds:,.0f} | {ways[0][2] / seconds:,.1f} |"
        )


if __name__ == "__main__":
    main()
