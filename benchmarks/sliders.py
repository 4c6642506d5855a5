"""Sliders on the avatar base: six edits by differential LoRAs, by direct fitting and by the pair network.

python benchmarks/sliders.py [--people 8] [-o docs/composition]
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from concepts import NEUTRAL, World
from PIL import Image

from benchmarks.ablations.paired_edit import paired
from data_builder.avatars.edits import edited
from data_builder.avatars.identity import SPLITS, identity, scene
from data_builder.avatars.rendering import draw
from data_builder.baselines.differential_lora import STRENGTHS, differential
from hyperlora import pretrained
from hyperlora.cpu import keep_heap
from hyperlora.data.images import pixels_of, to_image
from hyperlora.diffusion.diffusion_base import load_base
from hyperlora.diffusion.image_editing import apply_edit
from hyperlora.diffusion.multi_lora import composed
from hyperlora.diffusion.text_to_image import render
from hyperlora.evaluation.report import contact_sheet
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.pair_to_lora import PairToLora

SLIDERS = {
    "sunglasses": ("glasses", "sunglasses"),
    "smile": ("expression", "laughing"),
    "closed eyes": ("eyes", "closed"),
    "spacesuit": ("garment", "spacesuit"),
    "red background": ("background", "red"),
    "beard": ("facial_hair", "full beard"),
}
SILENT = {
    "expression": "serious",
    "eyes": "open eyes",
    "garment": "wearing a blue sweater",
    "background": "gray background",
}
"""What the sliders' prompt says, but for what they slide."""
WATCHED = ("hair", "hair_color", "skin", "garment", "background", "glasses", "expression")


def sliders(world: World, out: Path) -> None:
    """Six edits on held-out people: does it change, does the rest stay, is it monotone? By differential LoRAs and by
    one LoRA fitted directly to the same pairs in as many steps, under a prompt that is silent about the attribute; and
    by the pair network's LoRA of those pairs, on drawn pictures of the same people, with the base of edits."""
    print("| edit | method | without | accuracy at 1 | at 2 | others kept at 1 | monotone |")
    print("|---|---|---|---|---|---|---|")
    grid = []
    for name, (attribute, value) in SLIDERS.items():
        for method in (differential, paired):
            drawn = drawn_with(world, attribute, world.change(attribute, value, method=method))
            print(f"| {name} | {method.__name__} | {slid(world, drawn, attribute, value)} |", flush=True)
            if method is differential:
                grid.append([drawn[s][i] for i in (0, 1) for s in STRENGTHS])
        drawn = edited_with_network(world, attribute, value)
        print(f"| {name} | LoRA of Change | {slid(world, drawn, attribute, value)} |", flush=True)
    contact_sheet([f"{s:+g}" for s in STRENGTHS] * 2, grid, labels=list(SLIDERS)).save(out / "sliders.png")


def drawn_with(world: World, attribute: str, change: LoraWeights) -> dict[float, list[Image.Image]]:
    """Every person at every strength of a change, by prompt."""
    prompt = ", ".join(["a portrait of sks person", *(w for a, w in SILENT.items() if a != attribute)])
    n, drawn = len(world.people), {}
    for s in STRENGTHS:
        with composed(world.base.pipeline, [change * s]):
            drawn[s] = render(world.base, [prompt] * n, world.people, seeds=range(n), steps=world.steps)
    return drawn


def edited_with_network(world: World, attribute: str, value: str) -> dict[float, list[Image.Image]]:
    """Drawn pictures of every person, edited at every strength by the pair network's LoRA."""
    canvas = load_base(pretrained.EDIT_BASE)
    model = PairToLora.from_pretrained(pretrained.PAIR_MODEL, base=canvas)
    before, after = world.pairs(attribute, value)
    shown = [tuple(to_image(side) for side in pair) for pair in zip(before, after, strict=True)]
    change = model(shown)  # type: ignore[arg-type]
    plain, pictures = {k: v for k, v in NEUTRAL.items() if k == attribute}, []
    for seed in SPLITS["test"][: len(world.people)]:
        person, how = edited(identity(seed), replace(scene(seed, 1), hat="none", style="plain"), **plain)
        pictures.append(draw(person, how, canvas.resolution))
    seeds = range(len(pictures))
    return {s: apply_edit(canvas, pictures, change * s, seeds=seeds, steps=model.steps) for s in STRENGTHS}


def slid(world: World, drawn: Mapping[float, Sequence[Image.Image]], attribute: str, value: str) -> str:
    """Columns of the table of ``sliders``."""
    index, n = world.reader.attributes[attribute].index(value), len(drawn[0.0])
    seen = [world.reader(pixels_of(drawn[s])).logits[attribute].softmax(-1)[:, index].mean() for s in STRENGTHS]
    rates = [sum(v == value for v in world.read(drawn[s], attribute)) / n for s in (0.0, 1.0, 2.0)]
    same = [
        sum(a == b for a, b in zip(world.read(drawn[0.0], other), world.read(drawn[1.0], other), strict=True)) / n
        for other in WATCHED
        if other != attribute
    ]
    monotone = all(a <= b + 0.01 for a, b in pairwise(seen))
    curve = ", ".join(f"{float(v):.2f}" for v in seen)
    columns = [*(f"{rate:.2f}" for rate in rates), f"{sum(same) / len(same):.2f}"]
    return " | ".join([*columns, f"{'yes' if monotone else 'no'}: {curve}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/composition"))
    arguments = parser.parse_args()
    keep_heap()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sliders(World(arguments.people, arguments.steps), arguments.out)


if __name__ == "__main__":
    main()
