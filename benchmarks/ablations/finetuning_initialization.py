"""Initialization of per-subject fine-tuning: own random factors (zero), shared, or a prediction.

    python -m benchmarks.ablations.finetuning_initialization [--num-subjects 8] [--steps 60]
        [--inits zero shared network]

Each avatar is fitted twice, with different seeds. The program prints four figures for each
initialization.

* The loss on fixed timesteps and noise, before and after.
* The loss of the *midpoint* of both LoRAs, which is as low in a smooth weight space.
* The cosine of their deviations from the mean.
* The variance of the first principal components.
"""

import argparse
import time
from dataclasses import replace

import torch
from torch import Tensor

from data_builder.build.make_plan import make_plan
from data_builder.build.plan import PlannedLora, Recipe
from data_builder.build.subject_data import SubjectData, load_subject
from data_builder.build.trainer import ChunkTrainer, load_recipe_base
from data_builder.sources.sources import AvatarSource
from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.finetuning.config import FineTuneConfig
from hyperlora.finetuning.examples import TrainingExamples, ValidationProbe
from hyperlora.finetuning.trainer import fine_tune_loras


def compute_loss(
    trainer: ChunkTrainer,
    codes: Tensor,
    planned_loras: list[PlannedLora],
    subjects: list[SubjectData],
) -> float:
    """Compute the mean loss of LoRAs on the fixed timesteps and noise of each subject.

    Args:
        trainer: Base model and parametrization.
        codes: Codes of the LoRAs [K, P].
        planned_loras: Planned LoRA of each subject, with its seed.
        subjects: Training data of each subject.

    Returns:
        Mean over subjects.
    """
    val_examples = TrainingExamples.pad_and_cat([subject.val_examples for subject in subjects])
    probe = ValidationProbe.from_examples(val_examples, [lora.seed for lora in planned_loras])
    result = fine_tune_loras(
        trainer.base,
        val_examples,
        codes,
        trainer.parametrization,
        FineTuneConfig(num_steps=0, lr=1.0),
        probe=probe,
    )
    return float(result.val_losses[0].mean())


def evaluate_init(init: str, recipe: Recipe, source: AvatarSource, base: DiffusionBase) -> str:
    """Fit every avatar twice from one initialization.

    Args:
        init: Initialization, see ``Recipe``.
        recipe: Recipe of the fit.
        source: Avatars.
        base: Base model of the recipe.

    Returns:
        A line of figures.
    """
    plan = make_plan(source, replace(recipe, init=init), loras_per_subject=2)
    trainer = ChunkTrainer(plan, base)
    # the first LoRAs of all subjects, then the second ones
    planned_loras = sorted(plan.rows, key=lambda row: row.repetition)
    subjects = [load_subject(row, trainer.source, base, recipe) for row in planned_loras]
    start_time = time.perf_counter()
    result = trainer.fit_subjects(planned_loras, subjects)
    seconds = (time.perf_counter() - start_time) / len(planned_loras)
    codes = result.weights.flatten()  # [2 * subjects, P]
    first_codes, second_codes = codes.chunk(2)
    num_subjects = len(first_codes)
    midpoint_loss = compute_loss(
        trainer,
        (first_codes + second_codes) / 2,
        planned_loras[:num_subjects],
        subjects[:num_subjects],
    )
    deviations = codes - codes.mean(0)
    first_deviations, second_deviations = deviations.chunk(2)
    cosine = torch.cosine_similarity(first_deviations, second_deviations, dim=-1).mean()
    variances = torch.linalg.svdvals(deviations).square()
    half = num_subjects // 2
    explained = variances[:half].sum() / variances.sum()
    best_losses = result.val_losses.nan_to_num(torch.inf).amin(0)
    return (
        f"{init:8s} loss {float(result.val_losses[0].mean()):.4f} -> "
        f"{float(best_losses.mean()):.4f}, midpoint {midpoint_loss:.4f}, "
        f"cosine of two fits {float(cosine):.2f}, "
        f"first {half} of {len(codes)} components {float(explained):.0%}, {seconds:.1f} s/LoRA"
    )


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-subjects", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--first-seed", type=int, default=1_000_000, help="Seed of the first avatar (validation)."
    )
    parser.add_argument("--inits", nargs="+", default=["zero", "shared", "network"])
    arguments = parser.parse_args()
    disable_malloc_trim()
    recipe = Recipe(
        str(pretrained.BASE_DIR),
        finetune_steps=arguments.steps,
        eval_every=max(1, arguments.steps // 4),
        storage_dtype="float32",
    )
    end_seed = arguments.first_seed + arguments.num_subjects
    source = AvatarSource(arguments.first_seed, end_seed, portraits_per_identity=4)
    base = load_recipe_base(recipe)
    for init in arguments.inits:
        print(evaluate_init(init, recipe, source, base))


if __name__ == "__main__":
    main()
