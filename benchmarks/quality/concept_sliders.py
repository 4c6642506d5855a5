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

from benchmarks.ablations.paired_edit import fit_pair_edit
from data_builder.avatars.edits import apply_edits
from data_builder.avatars.identity import SPLITS, sample_identity, sample_scene
from data_builder.avatars.rendering import render_portrait
from data_builder.baselines.differential_lora import STRENGTHS, fit_differential_lora
from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.data.images import stack_images, to_image
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.image_editing import edit_images
from hyperlora.diffusion.multi_lora import compose_loras
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.evaluation.report import draw_contact_sheet
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
NEUTRAL_PROMPTS = {
    "expression": "serious",
    "eyes": "open eyes",
    "garment": "wearing a blue sweater",
    "background": "gray background",
}
"""What the sliders' prompt says, but for what they slide."""
CHECKED_ATTRIBUTES = (
    "hair",
    "hair_color",
    "skin",
    "garment",
    "background",
    "glasses",
    "expression",
)


def evaluate_sliders(evaluation: World, output_dir: Path) -> None:
    """Six edits on held-out people: does it change, does the rest stay, is it monotone? By differential LoRAs and by
    one LoRA fitted directly to the same pairs in as many steps, under a prompt that is silent about the attribute; and
    by the pair network's LoRA of those pairs, on drawn pictures of the same people, with the base of edits."""
    print("| edit | method | without | accuracy at 1 | at 2 | others kept at 1 | monotone |")
    print("|---|---|---|---|---|---|---|")
    grid = []
    for name, (attribute, value) in SLIDERS.items():
        for method in (fit_differential_lora, fit_pair_edit):
            images = generate_with_slider(
                evaluation,
                attribute,
                evaluation.fit_concept_lora(attribute, value, fit_method=method),
            )
            print(
                f"| {name} | {method.__name__} | {format_slider_row(evaluation, images, attribute, value)} |",
                flush=True,
            )
            if method is fit_differential_lora:
                grid.append([images[s][i] for i in (0, 1) for s in STRENGTHS])
        images = edit_with_pair_hypernetwork(evaluation, attribute, value)
        print(
            f"| {name} | LoRA of Change | {format_slider_row(evaluation, images, attribute, value)} |",
            flush=True,
        )
    draw_contact_sheet([f"{s:+g}" for s in STRENGTHS] * 2, grid, row_labels=list(SLIDERS)).save(
        output_dir / "sliders.png"
    )


def generate_with_slider(
    evaluation: World, attribute: str, lora: LoraWeights
) -> dict[float, list[Image.Image]]:
    """Every person at every strength of a change, by prompt."""
    prompt = ", ".join(
        ["a portrait of sks person", *(w for a, w in NEUTRAL_PROMPTS.items() if a != attribute)]
    )
    n, images = len(evaluation.subject_loras), {}
    for s in STRENGTHS:
        with compose_loras(evaluation.base.pipeline, [lora * s]):
            images[s] = generate_images(
                evaluation.base,
                [prompt] * n,
                evaluation.subject_loras,
                seeds=range(n),
                num_inference_steps=evaluation.steps,
            )
    return images


def edit_with_pair_hypernetwork(
    evaluation: World, attribute: str, value: str
) -> dict[float, list[Image.Image]]:
    """Drawn pictures of every person, edited at every strength by the pair network's LoRA."""
    edit_base = load_diffusion_base(pretrained.EDIT_BASE_DIR)
    model = PairToLora.from_pretrained(pretrained.PAIR_TO_LORA_DIR, base=edit_base)
    before, after = evaluation.draw_concept_pairs(attribute, value)
    image_pairs = [
        tuple(to_image(side) for side in pair) for pair in zip(before, after, strict=True)
    ]
    lora = model(image_pairs)  # type: ignore[arg-type]
    neutral_edit, images = {k: v for k, v in NEUTRAL.items() if k == attribute}, []
    for seed in SPLITS["test"][: len(evaluation.subject_loras)]:
        person, avatar_scene = apply_edits(
            sample_identity(seed),
            replace(sample_scene(seed, 1), hat="none", style="plain"),
            **neutral_edit,
        )
        images.append(render_portrait(person, avatar_scene, edit_base.resolution))
    seeds = range(len(images))
    return {
        s: edit_images(
            edit_base, images, lora * s, seeds=seeds, num_inference_steps=model.num_inference_steps
        )
        for s in STRENGTHS
    }


def format_slider_row(
    evaluation: World, images: Mapping[float, Sequence[Image.Image]], attribute: str, value: str
) -> str:
    """Columns of the table of ``evaluate_sliders``."""
    index, n = evaluation.reader.attributes[attribute].index(value), len(images[0.0])
    probabilities = [
        evaluation.reader(stack_images(images[s])).logits[attribute].softmax(-1)[:, index].mean()
        for s in STRENGTHS
    ]
    rates = [
        sum(v == value for v in evaluation.predict_labels(images[s], attribute)) / n
        for s in (0.0, 1.0, 2.0)
    ]
    agreement = [
        sum(
            a == b
            for a, b in zip(
                evaluation.predict_labels(images[0.0], other),
                evaluation.predict_labels(images[1.0], other),
                strict=True,
            )
        )
        / n
        for other in CHECKED_ATTRIBUTES
        if other != attribute
    ]
    monotone = all(a <= b + 0.01 for a, b in pairwise(probabilities))
    curve = ", ".join(f"{float(v):.2f}" for v in probabilities)
    columns = [*(f"{rate:.2f}" for rate in rates), f"{sum(agreement) / len(agreement):.2f}"]
    return " | ".join([*columns, f"{'yes' if monotone else 'no'}: {curve}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/composition"))
    arguments = parser.parse_args()
    disable_malloc_trim()
    arguments.out.mkdir(parents=True, exist_ok=True)
    evaluate_sliders(World(arguments.people, arguments.steps), arguments.out)


if __name__ == "__main__":
    main()
