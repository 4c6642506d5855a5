"""LoRAs per hour *to equal identity*: PEFT from scratch against multi-LoRA fine-tuning and warm
starts.

    data-builder write-benchmark -o runs/data/benchmark-validation --split validation
        --num-subjects 16
    python -m benchmarks.speed.time_to_identity runs/data/benchmark-validation [--num-subjects 6]
        [--dataset runs/avatars/build]

All methods fit the same layout, photos, batch size and optimizer. Half of a subject's photos train,
the others define the identity score. The target is the score of the best fit from scratch.
Seconds per step are measured for three methods.

* PEFT with photos and prompt encoded at every step, as training scripts do.
* PEFT with both encoded once.
* All subjects together.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.avatar_evaluator import load_subject_evaluator
from benchmarks.speed.multi_lora_finetuning import fit_multi_lora, fit_with_peft
from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.evaluation.subject_evaluator import SubjectEvaluator, SubjectResult
from hyperlora.finetuning.config import FineTuneConfig
from hyperlora.finetuning.examples import TrainingExamples
from hyperlora.finetuning.refine import make_photo_examples
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora import ImageToLora

MULTI_LORA = "all subjects together"
PROMPT = "a portrait of sks person"
MEAN_SAMPLE_SIZE = 128
"""LoRAs of the dataset whose mean is a start."""


def evaluate_identity(
    evaluator: SubjectEvaluator,
    name: str,
    init_loras: LoraWeights,
    examples: TrainingExamples,
    config: FineTuneConfig,
    eval_steps: list[int],
) -> list[tuple[int, SubjectResult]]:
    """Fine-tune LoRAs and evaluate them after some numbers of steps.

    Args:
        evaluator: Benchmark and evaluator.
        name: Name of the start.
        init_loras: LoRAs to start from, one per subject.
        examples: Examples of the subjects.
        config: Settings of the fit, whose steps are replaced.
        eval_steps: Numbers of steps; 0 is the start.

    Returns:
        Steps and results.
    """
    results = []
    if 0 in eval_steps:
        results.append((0, evaluator.evaluate(f"{name}, 0 steps", init_loras)))
    if fit_steps := [num_steps for num_steps in eval_steps if num_steps]:
        result = fine_tune_loras(
            evaluator.base,
            examples,
            init_loras.flatten(),
            partial(LoraWeights.unflatten, init_loras.layout),
            FineTuneConfig(
                num_steps=max(fit_steps),
                lr=config.lr,
                batch_size=config.batch_size,
                snapshot_steps=fit_steps,
                progress_label=name,
            ),
        )
        for num_steps in fit_steps:
            row_name = f"{name}, {num_steps} steps"
            row = evaluator.evaluate(row_name, result.snapshots[num_steps])
            results.append((num_steps, row))
    for _, row in results:
        print(
            f"{row.name}: identity {row.identity}, prompt accuracy {row.prompt_accuracy}",
            flush=True,
        )
    return results


def measure_step_times(
    base: DiffusionBase, photos: Tensor, init_loras: LoraWeights, num_steps: int, batch_size: int
) -> dict[str, float]:
    """Measure the seconds per step and subject of each method.

    Args:
        base: Base model.
        photos: Photos of the subjects [K, views, 3, h, w].
        init_loras: LoRAs to start from, one per subject.
        num_steps: Steps to time.
        batch_size: Examples of each subject per step.

    Returns:
        Seconds by method.
    """
    examples = make_photo_examples(base, photos, PROMPT)
    options = (base, examples, init_loras, num_steps, batch_size)

    def encode_photos(subject: int) -> TrainingExamples:
        views = torch.randperm(photos.shape[1])[:batch_size]
        return make_photo_examples(base, photos[subject : subject + 1, views], PROMPT)

    methods: dict[str, Callable[[], tuple[float, float]]] = {
        "PEFT, encoding at every step": lambda: fit_with_peft(*options, encode_photos),
        "PEFT, encoding once": lambda: fit_with_peft(*options),
        MULTI_LORA: lambda: fit_multi_lora(*options),
    }
    return {name: fit()[0] / num_steps for name, fit in methods.items()}


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("--dataset", type=Path, help="LoRAs whose mean is a start too.")
    parser.add_argument("--num-subjects", type=int, default=6)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[100, 200, 400], help="Steps from scratch."
    )
    parser.add_argument(
        "--warm-steps",
        type=int,
        nargs="+",
        default=[0, 12, 48],
        help="Steps from the mean or the network.",
    )
    parser.add_argument("--timed-steps", type=int, default=12, help="Steps that are timed.")
    arguments = parser.parse_args()
    disable_malloc_trim()
    torch.manual_seed(0)
    evaluator = load_subject_evaluator(
        arguments.benchmark, arguments.num_subjects, num_inference_steps=12
    )
    base, photos = evaluator.base, evaluator.benchmark.photos
    network = ImageToLora.from_pretrained(pretrained.IMAGE_TO_LORA_DIR, base=base)
    examples = make_photo_examples(base, photos, PROMPT)
    num_subjects = len(photos)
    random_loras = LoraWeights.zeros(network.layout, (num_subjects,), 0.05)
    config = FineTuneConfig(num_steps=0, lr=arguments.lr, batch_size=arguments.batch_size)
    scratch = evaluate_identity(
        evaluator, "from scratch", random_loras, examples, config, arguments.steps
    )
    best_steps, best = max(scratch, key=lambda item: item[1].identity.mean)

    with torch.no_grad():
        warm_starts = {"the network's prediction": network.forward(photos)}
        start_time = time.perf_counter()
        network.forward(photos[:1])
        predict_time_s = time.perf_counter() - start_time
    if arguments.dataset:
        data = LoraDataset(arguments.dataset, "train")
        stride = max(1, len(data) // MEAN_SAMPLE_SIZE)
        mean = data.get_weights(range(0, len(data), stride)).mean()
        codes = mean.flatten().expand(num_subjects, -1)
        warm_starts["the mean LoRA"] = LoraWeights.unflatten(mean.layout, codes)
    warm_config = FineTuneConfig(num_steps=0, lr=arguments.lr / 3, batch_size=config.batch_size)
    steps_to_target: dict[str, int] = {}
    for name, init_loras in warm_starts.items():
        for num_steps, row in evaluate_identity(
            evaluator, name, init_loras, examples, warm_config, arguments.warm_steps
        ):
            if row.identity.mean >= best.identity.mean:
                steps_to_target.setdefault(name, num_steps)

    step_times = measure_step_times(
        base, photos, random_loras, arguments.timed_steps, arguments.batch_size
    )
    methods = [(name, best_steps, step_s * best_steps) for name, step_s in step_times.items()]
    for name, num_steps in steps_to_target.items():
        seconds = step_times[MULTI_LORA] * num_steps + predict_time_s
        methods.append((f"{MULTI_LORA}, from {name}", num_steps, seconds))
    _, _, reference_s = methods[0]
    print(
        f"\nto identity {best.identity} ({best.name}, prompt accuracy {best.prompt_accuracy})\n\n"
        "| method | steps | seconds | LoRAs/hour | ratio |"
    )
    print("|---" * 5 + "|")
    for name, num_steps, seconds in methods:
        print(
            f"| {name} | {num_steps} | {seconds:.2f} | {3600 / seconds:,.0f} | "
            f"{reference_s / seconds:,.1f} |"
        )


if __name__ == "__main__":
    main()
