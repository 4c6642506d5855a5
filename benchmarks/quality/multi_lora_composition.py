"""Several LoRAs in one image on the avatar base: regions, composition strategies, AutoLoRA.

python -m benchmarks.quality.multi_lora_composition regions|strategies|autolora
    [--num-subjects 16] [-o docs/composition]
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.quality.concept_loras import AvatarEvaluation
from hyperlora.cpu import disable_malloc_trim
from hyperlora.data.contact_sheet import draw_contact_sheet
from hyperlora.data.images import stack_images, to_image
from hyperlora.diffusion.autolora_guidance import apply_autolora_guidance
from hyperlora.diffusion.multi_lora import CompositionConfig, Strategy, compose_loras
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.evaluation.metrics import Score

CONCEPTS = {
    "garment": ("garment", "spacesuit"),
    "background": ("background", "red"),
    "glasses": ("glasses", "sunglasses"),
    "style": ("style", "sepia"),
}
CONCEPT_REGIONS = {
    "person": (0.0, 0.0, 1.0, 0.75),
    "garment": (0.0, 0.75, 1.0, 1.0),
    "background": (0.0, 0.0, 1.0, 0.25),
    "glasses": (0.25, 0.3, 0.75, 0.55),
    "style": (0.0, 0.0, 1.0, 1.0),
}
"""Left, top, right, bottom of each concept in a portrait, 0 to 1, for the spatial strategy."""
STRATEGIES: dict[Strategy, dict[str, Any]] = {
    "merge": {},
    "switch": {"switch_every": 1},
    "composite": {},
    "spatial": {},
}
"""Options of ``CompositionConfig`` by strategy."""
GAMMAS = {0.0: "o", 0.5: "s", 1.0: "^", 1.5: "D", 2.0: "*"}
"""Markers of the plot by AutoLoRA scale γ."""


def evaluate_regions(evaluation: AvatarEvaluation, output_dir: Path) -> None:
    """Evaluate two subjects side by side, each in a window; the windows overlap by a quarter of
    their width.

    Args:
        evaluation: Base model and subjects.
        output_dir: Folder of ``regions.png``.
    """
    num_subjects = len(evaluation.subject_loras)
    size = evaluation.base.resolution
    width = 2 * size - size // 8 * 2
    boxes = [(0.0, 0.0, size / width, 1.0), (1 - size / width, 0.0, 1.0, 1.0)]
    prompt = "a portrait of sks person, smiling, open eyes, wearing a blue hoodie, gray background"
    alone, left, right, crosstalk = [], [], [], []
    sheet = []
    for i in range(num_subjects):
        j = (i + 1) % num_subjects
        (single,) = generate_images(
            evaluation.base,
            [prompt],
            evaluation.subject_loras[i],
            seeds=[50 + i],
            num_inference_steps=evaluation.num_inference_steps,
        )
        with compose_loras(
            evaluation.base.pipeline,
            [evaluation.subject_loras[i], evaluation.subject_loras[j]],
            "spatial",
            config=CompositionConfig(regions=boxes, windowed=True),
        ):
            (both,) = generate_images(
                evaluation.base,
                [prompt],
                None,
                seeds=[50 + i],
                num_inference_steps=evaluation.num_inference_steps,
                width=width,
                height=size,
            )
        halves = [both.crop((0, 0, size, size)), both.crop((width - size, 0, width, size))]
        alone.append(evaluation.score_identity([single], [i])[0])
        left.append(evaluation.score_identity([halves[0]], [i])[0])
        right.append(evaluation.score_identity([halves[1]], [j])[0])
        crosstalk += [
            evaluation.score_identity([halves[0]], [j])[0],
            evaluation.score_identity([halves[1]], [i])[0],
        ]
        photos = evaluation.evaluator.benchmark.photos
        left_photo, right_photo = (to_image(photos[subject, 0]) for subject in (i, j))
        sheet.append(_combine_with_photos(left_photo, both, right_photo))
    scores = {"alone": alone, "left region": left, "right region": right, "cross-talk": crosstalk}
    for name, values in scores.items():
        print(f"| {name} | {Score.from_samples(torch.stack(values))} |")
    ratio = float(torch.stack(left + right).mean() / torch.stack(alone).mean())
    print(f"identity in regions relative to alone: {ratio:.2f}")
    rows = [sheet[i : i + 2] for i in range(0, min(num_subjects, 8), 2)]
    _make_image_grid(rows, gap=12).save(output_dir / "regions.png")


def evaluate_strategies(evaluation: AvatarEvaluation, output_dir: Path) -> None:
    """Evaluate a subject with 1 to 4 concepts under each composition strategy.

    Args:
        evaluation: Base model and subjects.
        output_dir: Folder of ``strategies.png``.
    """
    concepts = {name: evaluation.fit_concept_lora(*concept) for name, concept in CONCEPTS.items()}
    prompt = "a portrait of sks person"
    print("| LoRAs | strategy | identity | concept accuracy |\n|---|---|---|---|")
    images = {}
    num_subjects = len(evaluation.subject_loras)
    for k in range(1, len(concepts) + 1):
        names = list(concepts)[:k]
        region_options = {
            "regions": [CONCEPT_REGIONS["person"], *(CONCEPT_REGIONS[name] for name in names)]
        }
        for strategy, options in STRATEGIES.items():
            config = CompositionConfig(
                **options | (region_options if strategy == "spatial" else {})
            )
            subject_images = []
            for i in range(num_subjects):
                loras = [evaluation.subject_loras[i], *(concepts[name] for name in names)]
                with compose_loras(evaluation.base.pipeline, loras, strategy, config=config):
                    subject_images += generate_images(
                        evaluation.base,
                        [prompt],
                        None,
                        seeds=[70 + i],
                        num_inference_steps=evaluation.num_inference_steps,
                    )
            is_correct = []
            for attribute, value in (CONCEPTS[name] for name in names):
                labels = evaluation.predict_labels(subject_images, attribute)
                is_correct.append([label == value for label in labels])
            concept_accuracy = torch.tensor(is_correct).float().mean(0)  # [subjects]
            identity = evaluation.score_identity(subject_images, range(num_subjects))
            scores = f"{Score.from_samples(identity)} | {Score.from_samples(concept_accuracy)}"
            print(f"| person + {' + '.join(names)} | {strategy} | {scores} |", flush=True)
            images[k, strategy] = subject_images[:2]
    counts = range(1, len(concepts) + 1)
    grid = [[images[k, s][i] for i in range(2) for s in STRATEGIES] for k in counts]
    labels = ["person + " + " + ".join(list(concepts)[:k]) for k in counts]
    draw_contact_sheet([*STRATEGIES, *STRATEGIES], grid, row_labels=labels).save(
        output_dir / "strategies.png"
    )


def evaluate_autolora(evaluation: AvatarEvaluation, output_dir: Path) -> None:
    """Evaluate identity against diversity over the scales of AutoLoRA and of the guidance.

    Diversity is the mean RMS difference between images of one subject with different seeds.

    Args:
        evaluation: Base model and subjects.
        output_dir: Folder of ``autolora.png``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    prompt, seeds, num_subjects = (
        "a portrait of sks person",
        range(4),
        len(evaluation.subject_loras),
    )
    print("| w | γ | identity | diversity |\n|---|---|---|---|")
    figure, axes = plt.subplots(figsize=(6, 4))
    for w in (1.5, 3.0, 5.0):
        curve = []
        for gamma in GAMMAS:
            identity_scores, distances = [], []
            for i in range(num_subjects):
                with apply_autolora_guidance(
                    evaluation.base.pipeline, evaluation.subject_loras[i], gamma
                ):
                    images = generate_images(
                        evaluation.base,
                        [prompt] * len(seeds),
                        None,
                        seeds=seeds,
                        num_inference_steps=evaluation.num_inference_steps,
                        guidance_scale=w,
                    )
                pixels = stack_images(images).flatten(1)
                identity_scores.append(evaluation.score_identity(images, [i] * len(seeds)).mean())
                distances.append(torch.pdist(pixels).mean() / pixels.shape[1] ** 0.5)
            identity = Score.from_samples(torch.stack(identity_scores))
            diversity = Score.from_samples(torch.stack(distances))
            print(f"| {w:g} | {gamma:g} | {identity} | {diversity} |", flush=True)
            curve.append((diversity.mean, identity.mean, gamma))
        diversities, identities, _ = zip(*curve, strict=True)
        (line,) = axes.plot(diversities, identities, label=f"guidance {w:g}")
        for x, y, gamma in curve:
            axes.plot(x, y, GAMMAS[gamma], color=line.get_color(), markersize=7)
    for gamma, marker in GAMMAS.items():
        axes.plot([], [], marker, color="gray", label=f"γ {gamma:g}")
    axes.set_xlabel("diversity (RMS difference between seeds)")
    axes.set_ylabel("identity")
    axes.set_title("AutoLoRA: γ along each curve")
    axes.legend()
    figure.tight_layout()
    figure.savefig(output_dir / "autolora.png", dpi=110)


def _make_image_grid(rows: Sequence[Sequence[Image.Image]], gap: int = 0) -> Image.Image:
    """Draw images of one size in rows, with ``gap`` white pixels between them."""
    width, height = (n + gap for n in rows[0][0].size)
    sheet = Image.new("RGB", (max(map(len, rows)) * width - gap, len(rows) * height - gap), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * width, y * height))
    return sheet


def _combine_with_photos(left: Image.Image, image: Image.Image, right: Image.Image) -> Image.Image:
    """Put square photos of the same height on both sides of an image."""
    height = image.height
    strip = Image.new("RGB", (image.width + 2 * height, height))
    strip.paste(left.resize((height, height)), (0, 0))
    strip.paste(image, (height, 0))
    strip.paste(right.resize((height, height)), (image.width + height, 0))
    return strip


def main() -> None:
    """Parse the command line and print the figures."""
    tasks: dict[str, Callable[[AvatarEvaluation, Path], None]] = {
        "regions": evaluate_regions,
        "strategies": evaluate_strategies,
        "autolora": evaluate_autolora,
    }
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("part", choices=tasks)
    parser.add_argument("--num-subjects", type=int, default=16)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("-o", "--output-dir", type=Path, default=Path("docs/composition"))
    arguments = parser.parse_args()
    disable_malloc_trim()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    evaluation = AvatarEvaluation(arguments.num_subjects, arguments.steps)
    tasks[arguments.part](evaluation, arguments.output_dir)


if __name__ == "__main__":
    main()
