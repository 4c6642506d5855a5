"""How well LoRAs live together on the avatar base: regions, strategies, AutoLoRA, sliders; tables and pictures.

    python benchmarks/composition_quality.py regions|strategies|autolora|sliders [--people 16] [-o docs/composition]

Concept LoRAs are differential LoRAs, fitted to drawn pairs of training people; people are the benchmark's, never seen.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data_builder.avatars import SPLITS, draw, edited, identity, scene
from data_builder.differential import differential
from data_builder.paired import paired
from hyperlora import bundle
from hyperlora.data import to_image, to_tensor
from hyperlora.encoders import Reader
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.metrics import Score
from hyperlora.evaluation.personalisation import Judge, pixels_of
from hyperlora.heap import keep_heap
from hyperlora.lora import LoraWeights
from hyperlora.pipelines import ImageToLora, PairToLora, load_base, render
from hyperlora.pipelines.composition import composed
from hyperlora.pipelines.editing import apply_edit
from hyperlora.pipelines.guidance import autolora

CONCEPTS = {
    "garment": ("garment", "spacesuit"),
    "background": ("background", "red"),
    "glasses": ("glasses", "sunglasses"),
    "style": ("style", "sepia"),
}
NEUTRAL = {
    "glasses": "none",
    "expression": "neutral",
    "eyes": "open",
    "garment": "t-shirt",
    "background": "white",
    "facial_hair": "none",
    "style": "plain",
}
WHERE = {
    "person": (0.0, 0.0, 1.0, 0.75),
    "garment": (0.0, 0.75, 1.0, 1.0),
    "background": (0.0, 0.0, 1.0, 0.25),
    "glasses": (0.25, 0.3, 0.75, 0.55),
    "style": (0.0, 0.0, 1.0, 1.0),
}
"""Left, top, right, bottom of where a portrait shows each of them, for the spatial strategy."""
SLIDERS = {
    "sunglasses": ("glasses", "sunglasses"),
    "smile": ("expression", "laughing"),
    "closed eyes": ("eyes", "closed"),
    "spacesuit": ("garment", "spacesuit"),
    "red background": ("background", "red"),
    "beard": ("facial_hair", "full beard"),
}


STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
SILENT = {
    "expression": "serious",
    "eyes": "open eyes",
    "garment": "wearing a blue sweater",
    "background": "gray background",
}
"""What the sliders' prompt says, but for what they slide."""
WATCHED = ("hair", "hair_color", "skin", "garment", "background", "glasses", "expression")


class World:
    """The bundle, its benchmark and LoRAs of its people."""

    def __init__(self, people: int, steps: int) -> None:
        self.base = load_base(bundle.BASE)
        self.reader = Reader.from_pretrained(bundle.EVALUATOR)
        self.judge = Judge(self.base, self.reader, load_benchmark(bundle.BENCHMARK, self.base.resolution, people))
        model = ImageToLora.from_pretrained(bundle.MODEL, base=self.base)
        with torch.no_grad():
            self.people = model.forward(self.judge.benchmark.photos[:, :1])
        self.steps = steps

    def change(
        self, attribute: str, value: str, pairs: int = 4, steps: int = 120, method: Callable[..., Any] = differential
    ) -> LoraWeights:
        """A LoRA of one attribute's change, fitted to drawn pairs of training people."""
        before, after = self.pairs(attribute, value, pairs)
        return method(self.base, before, after, steps=steps, label=f"{attribute} {value}")

    def pairs(self, attribute: str, value: str, pairs: int = 4) -> tuple[Tensor, Tensor]:
        """Drawn pairs of training people, before and after, [pairs, 3, size, size] each."""
        made = []
        for seed in SPLITS["train"][:pairs]:
            person, how = identity(seed), replace(scene(seed, 1), hat="none", style="plain")
            if getattr(how, attribute, None) == value or getattr(person, attribute, None) == value:
                person, how = edited(person, how, **{attribute: NEUTRAL[attribute]})
            after = edited(person, how, **{attribute: value})
            size = self.base.resolution
            made.append(torch.stack([to_tensor(draw(*both), size) for both in ((person, how), after)]))
        before, after_ = torch.stack(made).unbind(1)
        return before, after_

    def identity_of(self, pictures: Sequence[Image.Image], people: Sequence[int]) -> Tensor:
        """Identity score of each picture as each person, on the benchmark's scale."""
        found = self.reader(pixels_of(pictures)).identity
        real = self.judge.scale.real[list(people)].mean(1)
        scale = self.judge.scale
        return ((found * real).sum(-1) - scale.different) / (scale.same - scale.different)

    def read(self, pictures: Sequence[Image.Image], attribute: str) -> list[str]:
        classes = self.reader.attributes[attribute]
        return [classes[i] for i in self.reader(pixels_of(pictures)).logits[attribute].argmax(-1).tolist()]


def regions(world: World, out: Path) -> None:
    """Two people side by side, each in a window of its own; the windows overlap by a quarter of their width."""
    n = len(world.people)
    size = world.base.resolution
    width = 2 * size - size // 8 * 2
    boxes = [(0.0, 0.0, size / width, 1.0), (1 - size / width, 0.0, 1.0, 1.0)]
    prompt = "a portrait of sks person, smiling, open eyes, wearing a blue hoodie, gray background"
    alone, left, right, crossed = [], [], [], []
    sheet = []
    for i in range(n):
        j = (i + 1) % n
        (single,) = render(world.base, [prompt], world.people[i], seeds=[50 + i], steps=world.steps)
        with composed(world.base.pipeline, [world.people[i], world.people[j]], "spatial", regions=boxes, window=True):
            (both,) = render(world.base, [prompt], None, seeds=[50 + i], steps=world.steps, width=width, height=size)
        halves = [both.crop((0, 0, size, size)), both.crop((width - size, 0, width, size))]
        alone.append(world.identity_of([single], [i])[0])
        left.append(world.identity_of([halves[0]], [i])[0])
        right.append(world.identity_of([halves[1]], [j])[0])
        crossed += [world.identity_of([halves[0]], [j])[0], world.identity_of([halves[1]], [i])[0]]
        sheet.append(both)
    rows = {"alone": alone, "left region": left, "right region": right, "cross-talk": crossed}
    for name, values in rows.items():
        print(f"| {name} | {Score.of(torch.stack(values))} |")
    ratio = float(torch.stack(left + right).mean() / torch.stack(alone).mean())
    print(f"regions keep {ratio:.2f} of the single-person score")
    _sheet([sheet[i : i + 2] for i in range(0, min(n, 8), 2)]).save(out / "regions.png")


def strategies(world: World, out: Path) -> None:
    """A person and 1 to 4 concepts: what each strategy keeps of all of them."""
    concepts = {name: world.change(*what) for name, what in CONCEPTS.items()}
    prompt = "a portrait of sks person"
    print("| LoRAs | strategy | identity | concepts kept |\n|---|---|---|---|")
    pictures = {}
    n = len(world.people)
    for k in range(1, len(concepts) + 1):
        names = list(concepts)[:k]
        where = [WHERE["person"], *(WHERE[name] for name in names)]
        options: dict[str, dict[str, Any]] = {
            "merge": {}, "switch": {"every": 1}, "composite": {}, "spatial": {"regions": where}
        }  # fmt: skip
        for strategy, given in options.items():
            drawn = []
            for i in range(n):
                loras = [world.people[i], *(concepts[name] for name in names)]
                with composed(world.base.pipeline, loras, strategy, **given):  # type: ignore[arg-type]
                    drawn += render(world.base, [prompt], None, seeds=[70 + i], steps=world.steps)
            kept = torch.tensor(
                [[v == CONCEPTS[name][1] for v in world.read(drawn, CONCEPTS[name][0])] for name in names]
            ).float()
            who = Score.of(world.identity_of(drawn, range(n)))
            print(f"| person + {' + '.join(names)} | {strategy} | {who} | {Score.of(kept.mean(0))} |", flush=True)
            pictures[k, strategy] = drawn[:6]
    _sheet(list(pictures.values())).save(out / "strategies.png")


def autolora_sweep(world: World, out: Path) -> None:
    """Identity against diversity (mean distance of pictures of one person with different seeds) over γ and w."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    prompt, seeds, n = "a portrait of sks person", range(4), len(world.people)
    print("| w | γ | identity | diversity |\n|---|---|---|---|")
    figure, axes = plt.subplots(figsize=(6, 4))
    for w in (1.5, 3.0, 5.0):
        curve = []
        for gamma in (0.0, 0.5, 1.0, 1.5, 2.0):
            who, spread = [], []
            for i in range(n):
                with autolora(world.base.pipeline, world.people[i], gamma):
                    drawn = render(world.base, [prompt] * len(seeds), None, seeds=seeds, steps=world.steps, guidance=w)
                pixels = pixels_of(drawn).flatten(1)
                who.append(world.identity_of(drawn, [i] * len(seeds)).mean())
                spread.append(torch.pdist(pixels).mean() / pixels.shape[1] ** 0.5)
            one, other = Score.of(torch.stack(who)), Score.of(torch.stack(spread))
            print(f"| {w:g} | {gamma:g} | {one} | {other} |", flush=True)
            curve.append((other.mean, one.mean, gamma))
        axes.plot([c[0] for c in curve], [c[1] for c in curve], "o-", label=f"guidance {w:g}")
        for x, y, gamma in curve:
            axes.annotate(f"{gamma:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set_xlabel("diversity (RMS difference between seeds)")
    axes.set_ylabel("identity score I")
    axes.set_title("AutoLoRA: γ along each curve")
    axes.legend()
    figure.tight_layout()
    figure.savefig(out / "autolora.png", dpi=110)


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
                grid.append([drawn[s][0] for s in STRENGTHS] + [drawn[s][1] for s in STRENGTHS])
        drawn = edited_with_network(world, attribute, value)
        print(f"| {name} | LoRA of Change | {slid(world, drawn, attribute, value)} |", flush=True)
    _sheet(grid).save(out / "sliders.png")


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
    canvas = load_base(bundle.EDIT_BASE)
    model = PairToLora.from_pretrained(bundle.PAIR_MODEL, base=canvas)
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


def _sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (max(map(len, rows)) * width, len(rows) * height), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * width, y * height))
    return sheet


def main() -> None:
    parts: dict[str, Any] = {
        "regions": regions,
        "strategies": strategies,
        "autolora": autolora_sweep,
        "sliders": sliders,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=parts)
    parser.add_argument("--people", type=int, default=16)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/composition"))
    arguments = parser.parse_args()
    keep_heap()
    arguments.out.mkdir(parents=True, exist_ok=True)
    world = World(arguments.people, arguments.steps)
    parts[arguments.part](world, arguments.out)


if __name__ == "__main__":
    main()
