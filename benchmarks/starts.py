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
from data_builder.build.plan import Planned, Recipe
from data_builder.build.subject_data import Material, material
from data_builder.build.trainer import Farm, open_base
from data_builder.sources.sources import Avatars
from hyperlora import pretrained
from hyperlora.cpu import keep_heap
from hyperlora.finetuning.examples import Examples, Probe
from hyperlora.finetuning.trainer import fit


def loss_of(farm: Farm, rows: Tensor, planned: list[Planned], materials: list[Material]) -> float:
    """Mean loss on each subject's fixed draws, of LoRAs written as rows."""
    measure = Examples.joined([m.measure for m in materials])
    probe = Probe.of(measure, [p.seed for p in planned])
    done = fit(farm.base.denoiser, farm.base.noise_schedule, measure, rows, farm.space, steps=0, lr=0, probe=probe)
    return float(done.looks[0].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--first", type=int, default=1_000_000, help="Seed of the first person (validation).")
    parser.add_argument("--starts", nargs="+", default=["zero", "shared", "network"])
    arguments = parser.parse_args()
    keep_heap()
    recipe = Recipe(str(pretrained.BASE), steps=arguments.steps, every=max(1, arguments.steps // 4), rows="float32")
    people = Avatars(arguments.first, arguments.first + arguments.people, each=4)
    base = open_base(recipe)
    for start in arguments.starts:
        plan = make_plan(people, replace(recipe, start=start), views=2)
        farm = Farm(plan, base)
        planned = sorted(plan.rows, key=lambda row: row.view)  # all first views, then all second ones
        materials = [material(row, farm.source, base, recipe) for row in planned]
        began = time.perf_counter()
        fitted = farm.fit(planned, materials)
        seconds = (time.perf_counter() - began) / len(planned)
        one, two = fitted.weights.flatten().chunk(2)
        middle = loss_of(farm, (one + two) / 2, planned[: len(one)], materials[: len(one)])
        rows = torch.cat([one, two])
        spread = rows - rows.mean(0)
        near = torch.cosine_similarity(*spread.chunk(2), dim=-1).mean()
        power = torch.linalg.svdvals(spread).square()
        half = arguments.people // 2
        best = fitted.looks.nan_to_num(torch.inf).amin(0)
        print(
            f"{start:8s} loss {float(fitted.looks[0].mean()):.4f} -> {float(best.mean()):.4f}"
            f", midpoint {middle:.4f}, cosine of two fits {float(near):.2f}, "
            f"first {half} of {len(rows)} components {float(power[:half].sum() / power.sum()):.0%}, "
            f"{seconds:.1f} s/LoRA"
        )


if __name__ == "__main__":
    main()
