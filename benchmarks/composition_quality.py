"""How well LoRAs live together on the avatar base: regions, strategies, AutoLoRA; tables and pictures.

python benchmarks/composition_quality.py regions|strategies|autolora [--people 16] [-o docs/composition]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from concepts import World
from PIL import Image

from hyperlora.cpu import keep_heap
from hyperlora.data.images import pixels_of, to_image
from hyperlora.diffusion.autolora_guidance import autolora
from hyperlora.diffusion.multi_lora import composed
from hyperlora.diffusion.text_to_image import render
from hyperlora.evaluation.metrics import Score
from hyperlora.evaluation.report import contact_sheet

CONCEPTS = {
    "garment": ("garment", "spacesuit"),
    "background": ("background", "red"),
    "glasses": ("glasses", "sunglasses"),
    "style": ("style", "sepia"),
}
WHERE = {
    "person": (0.0, 0.0, 1.0, 0.75),
    "garment": (0.0, 0.75, 1.0, 1.0),
    "background": (0.0, 0.0, 1.0, 0.25),
    "glasses": (0.25, 0.3, 0.75, 0.55),
    "style": (0.0, 0.0, 1.0, 1.0),
}
"""Left, top, right, bottom of where a portrait shows each of them, for the spatial strategy."""
STRATEGIES: dict[str, dict[str, Any]] = {"merge": {}, "switch": {"every": 1}, "composite": {}, "spatial": {}}
GAMMAS = {0.0: "o", 0.5: "s", 1.0: "^", 1.5: "D", 2.0: "*"}


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
        photos = [to_image(world.judge.benchmark.photos[person, 0]) for person in (i, j)]
        sheet.append(_between(photos[0], both, photos[1]))
    rows = {"alone": alone, "left region": left, "right region": right, "cross-talk": crossed}
    for name, values in rows.items():
        print(f"| {name} | {Score.of(torch.stack(values))} |")
    ratio = float(torch.stack(left + right).mean() / torch.stack(alone).mean())
    print(f"regions keep {ratio:.2f} of the single-person score")
    _sheet([sheet[i : i + 2] for i in range(0, min(n, 8), 2)], gap=12).save(out / "regions.png")


def strategies(world: World, out: Path) -> None:
    """A person and 1 to 4 concepts: what each strategy keeps of all of them."""
    concepts = {name: world.change(*what) for name, what in CONCEPTS.items()}
    prompt = "a portrait of sks person"
    print("| LoRAs | strategy | identity | concepts kept |\n|---|---|---|---|")
    pictures = {}
    n = len(world.people)
    for k in range(1, len(concepts) + 1):
        names = list(concepts)[:k]
        where = {"regions": [WHERE["person"], *(WHERE[name] for name in names)]}
        for strategy, options in STRATEGIES.items():
            given = options | (where if strategy == "spatial" else {})
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
            pictures[k, strategy] = drawn[:2]
    counts = range(1, len(concepts) + 1)
    grid = [[pictures[k, s][i] for i in range(2) for s in STRATEGIES] for k in counts]
    labels = ["person + " + " + ".join(list(concepts)[:k]) for k in counts]
    contact_sheet([*STRATEGIES, *STRATEGIES], grid, labels=labels).save(out / "strategies.png")


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
        for gamma in GAMMAS:
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
        (line,) = axes.plot([c[0] for c in curve], [c[1] for c in curve], label=f"guidance {w:g}")
        for x, y, gamma in curve:
            axes.plot(x, y, GAMMAS[gamma], color=line.get_color(), markersize=7)
    for gamma, marker in GAMMAS.items():
        axes.plot([], [], marker, color="gray", label=f"γ {gamma:g}")
    axes.set_xlabel("diversity (RMS difference between seeds)")
    axes.set_ylabel("identity score I")
    axes.set_title("AutoLoRA: γ along each curve")
    axes.legend()
    figure.tight_layout()
    figure.savefig(out / "autolora.png", dpi=110)


def _sheet(rows: Sequence[Sequence[Image.Image]], gap: int = 0) -> Image.Image:
    """Pictures of one size in rows, unlabelled, ``gap`` pixels of white between them."""
    width, height = (n + gap for n in rows[0][0].size)
    sheet = Image.new("RGB", (max(map(len, rows)) * width - gap, len(rows) * height - gap), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * width, y * height))
    return sheet


def _between(left: Image.Image, picture: Image.Image, right: Image.Image) -> Image.Image:
    """``picture`` with square photos of its height on both sides."""
    height = picture.height
    strip = Image.new("RGB", (picture.width + 2 * height, height))
    strip.paste(left.resize((height, height)), (0, 0))
    strip.paste(picture, (height, 0))
    strip.paste(right.resize((height, height)), (picture.width + height, 0))
    return strip


def main() -> None:
    parts: dict[str, Any] = {
        "regions": regions,
        "strategies": strategies,
        "autolora": autolora_sweep,
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
