"""Where a fit starts, ablated: own random factors (zero), the same for all (shared), or a network's prediction.

    python benchmarks/starts.py [--people 8] [--steps 60] [--starts zero shared network]

Each person of the avatar world is fitted twice, by different seeds. Printed for each start: the loss on fixed draws
before and after, the loss of the *midpoint* of a person's two rows (in a smooth weight space as low), the cosine of
the two rows' deviations from the mean, and the share of all variance that the first principal components hold.
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
from hyperlora.finetuning.config import FineTuneConfig
from hyperlora.finetuning.examples import TrainingExamples, ValidationProbe
from hyperlora.finetuning.trainer import fine_tune_loras


def compute_loss(
    farm: ChunkTrainer, rows: Tensor, planned_loras: list[PlannedLora], subjects: list[SubjectData]
) -> float:
    """Mean loss on each subject's fixed draws, of LoRAs written as rows."""
    val_examples = TrainingExamples.pad_and_cat([m.val_examples for m in subjects])
    probe = ValidationProbe.from_examples(val_examples, [p.seed for p in planned_loras])
    result = fine_tune_loras(
        farm.base.denoiser,
        farm.base.noise_scheduler,
        val_examples,
        rows,
        farm.parametrization,
        FineTuneConfig(num_steps=0, lr=0),
        probe=probe,
    )
    return float(result.val_losses[0].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--first", type=int, default=1_000_000, help="Seed of the first person (validation)."
    )
    parser.add_argument("--starts", nargs="+", default=["zero", "shared", "network"])
    arguments = parser.parse_args()
    disable_malloc_trim()
    recipe = Recipe(
        str(pretrained.BASE_DIR),
        finetune_steps=arguments.steps,
        eval_every=max(1, arguments.steps // 4),
        storage_dtype="float32",
    )
    people = AvatarSource(
        arguments.first, arguments.first + arguments.people, portraits_per_identity=4
    )
    base = load_recipe_base(recipe)
    for start in arguments.starts:
        plan = make_plan(people, replace(recipe, start=start), loras_per_subject=2)
        farm = ChunkTrainer(plan, base)
        planned = sorted(
            plan.rows, key=lambda row: row.repetition
        )  # all first views, then all second ones
        materials = [load_subject(row, farm.source, base, recipe) for row in planned]
        start_time = time.perf_counter()
        result = farm.fit_subjects(planned, materials)
        seconds = (time.perf_counter() - start_time) / len(planned)
        first_fits, second_fits = result.weights.flatten().chunk(2)
        midpoint_loss = compute_loss(
            farm,
            (first_fits + second_fits) / 2,
            planned[: len(first_fits)],
            materials[: len(first_fits)],
        )
        rows = torch.cat([first_fits, second_fits])
        deviations = rows - rows.mean(0)
        cosine = torch.cosine_similarity(*deviations.chunk(2), dim=-1).mean()
        variances = torch.linalg.svdvals(deviations).square()
        half = arguments.people // 2
        best = result.val_losses.nan_to_num(torch.inf).amin(0)
        print(
            f"{start:8s} loss {float(result.val_losses[0].mean()):.4f} -> {float(best.mean()):.4f}"
            f", midpoint {midpoint_loss:.4f}, cosine of two fits {float(cosine):.2f}, "
            f"first {half} of {len(rows)} components {float(variances[:half].sum() / variances.sum()):.0%}, "
            f"{seconds:.1f} s/LoRA"
        )


if __name__ == "__main__":
    main()
