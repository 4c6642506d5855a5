"""Sliders on the avatar base: six edits by differential LoRAs, pair fine-tuning and the pair
hypernetwork.

python -m benchmarks.quality.concept_sliders [--num-subjects 8] [-o docs/composition]
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.ablations.paired_edit import PairEditConfig, fit_pair_edit
from benchmarks.quality.concept_loras import CONCEPT_STEPS, NEUTRAL_VALUES, AvatarEvaluation
from data_builder.avatars.edits import apply_edits
from data_builder.avatars.identity import SPLITS, sample_identity, sample_scene
from data_builder.avatars.rendering import render_portrait
from data_builder.baselines.differential_lora import STRENGTHS
from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.data.images import stack_images
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.diffusion.image_editing import edit_images
from hyperlora.diffusion.multi_lora import compose_loras
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.evaluation.report import draw_contact_sheet
from hyperlora.evaluation.tables import format_markdown_table
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
"""Phrases of the prompt by attribute; the slider's own is left out."""
SliderImages = Mapping[float, Sequence[Image.Image]]
"""Images of all subjects by strength of the LoRA."""
COLUMNS = (
    "edit",
    "method",
    "accuracy at 0",
    "at 1",
    "at 2",
    "other attributes unchanged at 1",
    "monotone",
)
CHECKED_ATTRIBUTES = (
    "hair",
    "hair_color",
    "skin",
    "garment",
    "background",
    "glasses",
    "expression",
)


def evaluate_sliders(evaluation: AvatarEvaluation, output_dir: Path) -> None:
    """Print accuracy, preservation and monotonicity of six sliders, and draw the differential ones.

    Differential LoRAs and LoRAs fitted directly to the same pairs, in as many steps, generate
    held-out subjects under a prompt that does not name the attribute. The LoRAs of the pair
    hypernetwork edit drawn images of the same subjects.

    Args:
        evaluation: Base model and subjects.
        output_dir: Folder of ``sliders.png``.
    """
    print(*format_markdown_table(COLUMNS, []), sep="\n")

    def print_row(name: str, method: str, images: SliderImages, attribute: str, value: str) -> None:
        cells = compute_slider_cells(evaluation, images, attribute, value)
        print(f"| {' | '.join([name, method, *cells])} |", flush=True)

    grid = []
    for name, (attribute, value) in SLIDERS.items():
        lora = evaluation.fit_concept_lora(attribute, value)
        images = generate_with_slider(evaluation, attribute, lora)
        print_row(name, "differential LoRA", images, attribute, value)
        grid.append([images[strength][i] for i in (0, 1) for strength in STRENGTHS])
        lora = evaluation.fit_concept_lora(attribute, value, fit_paired_concept)
        images = generate_with_slider(evaluation, attribute, lora)
        print_row(name, "pair fine-tuning", images, attribute, value)
        images = edit_with_pair_hypernetwork(evaluation, attribute, value)
        print_row(name, "pair hypernetwork", images, attribute, value)
    titles = [f"{strength:+g}" for strength in STRENGTHS] * 2
    draw_contact_sheet(titles, grid, row_labels=list(SLIDERS)).save(output_dir / "sliders.png")


def fit_paired_concept(
    base: DiffusionBase, before: Tensor, after: Tensor, label: str
) -> LoraWeights:
    """Fit one LoRA directly to pairs of a concept.

    Args:
        base: Base model.
        before: Images without the concept [pairs, 3, h, w].
        after: Images with the concept [pairs, 3, h, w].
        label: Label of the progress bar.

    Returns:
        The LoRA of the concept.
    """
    config = PairEditConfig(finetune_steps=CONCEPT_STEPS)
    return fit_pair_edit(base, before, after, config, progress_label=label)


def generate_with_slider(
    evaluation: AvatarEvaluation, attribute: str, lora: LoraWeights
) -> SliderImages:
    """Generate every subject at every strength of a concept LoRA.

    Args:
        evaluation: Base model and subjects.
        attribute: Attribute of the concept, which the prompt does not name.
        lora: LoRA of the concept.

    Returns:
        Images by strength, one per subject.
    """
    neutral = [phrase for name, phrase in NEUTRAL_PROMPTS.items() if name != attribute]
    prompt = ", ".join(["a portrait of sks person", *neutral])
    num_subjects, images = len(evaluation.subject_loras), {}
    for strength in STRENGTHS:
        with compose_loras(evaluation.base.pipeline, [lora * strength]):
            images[strength] = generate_images(
                evaluation.base,
                [prompt] * num_subjects,
                evaluation.subject_loras,
                seeds=range(num_subjects),
                num_inference_steps=evaluation.num_inference_steps,
            )
    return images


def edit_with_pair_hypernetwork(
    evaluation: AvatarEvaluation, attribute: str, value: str
) -> SliderImages:
    """Edit a drawn image of every subject at every strength of the pair hypernetwork's LoRA.

    Args:
        evaluation: Subjects and drawn pairs.
        attribute: Attribute to edit.
        value: New value of the attribute.

    Returns:
        Images by strength, one per subject.
    """
    edit_base = load_diffusion_base(pretrained.EDIT_BASE_DIR)
    model = PairToLora.from_pretrained(pretrained.PAIR_TO_LORA_DIR, base=edit_base)
    pairs = torch.stack(evaluation.draw_concept_pairs(attribute, value), 1)
    with torch.no_grad():
        lora = model.forward(pairs[None])[0]
    neutral = {name: value for name, value in NEUTRAL_VALUES.items() if name == attribute}
    images = []
    for seed in SPLITS["test"][: len(evaluation.subject_loras)]:
        scene = replace(sample_scene(seed, 1), hat="none", style="plain")
        portrait = apply_edits(sample_identity(seed), scene, **neutral)
        images.append(render_portrait(*portrait, edit_base.resolution))
    return {
        strength: edit_images(
            edit_base,
            images,
            lora * strength,
            seeds=range(len(images)),
            num_inference_steps=model.num_inference_steps,
        )
        for strength in STRENGTHS
    }


def compute_slider_cells(
    evaluation: AvatarEvaluation, images: SliderImages, attribute: str, value: str
) -> list[str]:
    """Compute the figures of a slider for the table.

    Args:
        evaluation: Classifier of attributes.
        images: Images by strength, one per subject.
        attribute: Attribute of the slider.
        value: Value at strength 1.

    Returns:
        Accuracy at strengths 0, 1 and 2, agreement of other attributes at 1, and monotonicity.
    """
    classifier, num_subjects = evaluation.classifier, len(images[0.0])
    class_index = classifier.attributes[attribute].index(value)
    probabilities = []
    for strength in STRENGTHS:
        logits = classifier(stack_images(images[strength])).logits[attribute]  # [subjects, classes]
        probabilities.append(float(logits.softmax(-1)[:, class_index].mean()))
    accuracies = [
        sum(label == value for label in evaluation.predict_labels(images[strength], attribute))
        / num_subjects
        for strength in (0.0, 1.0, 2.0)
    ]
    agreements = []
    for other in CHECKED_ATTRIBUTES:
        if other == attribute:
            continue
        labels = evaluation.predict_labels(images[0.0], other)
        new_labels = evaluation.predict_labels(images[1.0], other)
        num_equal = sum(old == new for old, new in zip(labels, new_labels, strict=True))
        agreements.append(num_equal / num_subjects)
    is_monotone = all(low <= high + 0.01 for low, high in pairwise(probabilities))
    curve = ", ".join(f"{probability:.2f}" for probability in probabilities)
    return [
        *(f"{accuracy:.2f}" for accuracy in accuracies),
        f"{sum(agreements) / len(agreements):.2f}",
        f"{'yes' if is_monotone else 'no'}: {curve}",
    ]


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-subjects", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("-o", "--output-dir", type=Path, default=Path("docs/composition"))
    arguments = parser.parse_args()
    disable_malloc_trim()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    evaluate_sliders(
        AvatarEvaluation(arguments.num_subjects, arguments.steps), arguments.output_dir
    )


if __name__ == "__main__":
    main()
