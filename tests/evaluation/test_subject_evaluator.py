"""Rows of the subject table: the images of each subject and prompt, and their scores by hand."""

from itertools import permutations, product
from math import sqrt
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from PIL import Image

from hyperlora.data.images import stack_images, to_image
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.errors import InvalidArgumentError
from hyperlora.evaluation.benchmark import Benchmark, Prompt
from hyperlora.evaluation.subject_evaluator import SubjectEvaluator
from hyperlora.lora.weights import LoraWeights
from tests.evaluation.color_classifier import make_color_classifier, paint
from tests.tiny_pipelines import get_tiny_pipeline

Color = tuple[float, float, float]
PROMPTS = (Prompt("a red dog", {"hue": "red"}), Prompt("a sky", {"tone": "bright", "hue": "blue"}))
COMPARISON: list[list[Color]] = [
    [(1, 0, 0), (0.8, 0.6, 0)],
    [(0, 1, 0), (0, 0.6, 0.8)],
    [(0, 0, 1), (0.6, 0, 0.8)],
]
IMAGES: list[list[Color]] = [  # [subject][prompt]
    [(0.6, 0.2, 0.0), (0.4, 0.6, 1.0)],
    [(0.2, 1.0, 0.0), (0.0, 0.0, 0.8)],
    [(0.8, 0.4, 0.2), (1.0, 0.8, 0.2)],
]


def make_benchmark(prompts: tuple[Prompt, ...] = PROMPTS) -> Benchmark:
    photos = torch.stack([paint((0.5, 0.5, 0.5)) for _ in COMPARISON])
    comparison_photos = torch.stack([paint(*colors) for colors in COMPARISON])
    return Benchmark(("ann", "bob", "cleo"), photos, comparison_photos, prompts)


def make_evaluator(prompts: tuple[Prompt, ...] = PROMPTS, **options: Any) -> SubjectEvaluator:
    base = DiffusionBase("tiny/base", get_tiny_pipeline("stable_diffusion").pipe)
    return SubjectEvaluator(base, make_color_classifier(), make_benchmark(prompts), **options)


def paint_images() -> list[Image.Image]:
    return [to_image(image) for image in paint(*[color for row in IMAGES for color in row])]


def compute_cosine(a: Color, b: Color) -> float:
    dot, lengths = (sum(x * y for x, y in zip(*pair, strict=True)) for pair in ((a, b), (a, a)))
    return dot / sqrt(lengths * sum(y * y for y in b))


def average_cosines(pairs: list[tuple[Color, Color]]) -> float:
    return fmean(compute_cosine(a, b) for a, b in pairs)


@pytest.mark.parametrize("truth", [{"hat": "cap"}, {"hue": "mauve"}, {"hue": "red", "tone": "dim"}])
def test_subject_evaluator_refuses_unknown_truth(truth: dict[str, str]) -> None:
    name, value = list(truth.items())[-1]
    with pytest.raises(InvalidArgumentError, match=f"{name} = '{value}' of prompt 'a tree'"):
        make_evaluator((*PROMPTS, Prompt("a tree", truth)))


def test_score_images_computes_identity_on_scale_of_comparison_photos() -> None:
    row = make_evaluator().score_images("one photo", paint_images(), seconds=1.5)
    same = average_cosines([pair for views in COMPARISON for pair in permutations(views, 2)])
    subject_pairs = permutations(COMPARISON, 2)
    different = average_cosines([pair for views in subject_pairs for pair in product(*views)])
    expected = [
        (average_cosines(list(product(images, views))) - different) / (same - different)
        for images, views in zip(IMAGES, COMPARISON, strict=True)
    ]
    assert row.identity.per_subject == pytest.approx(expected, abs=1e-4)
    assert row.identity.mean == pytest.approx(fmean(expected), abs=1e-4)
    assert row.identity.standard_error == pytest.approx(stdev(expected) / sqrt(3), abs=1e-4)
    assert (row.name, row.seconds, row.role) == ("one photo", 1.5, "control")


def test_score_images_computes_accuracy_of_prompts() -> None:
    """Fractions of right attributes per image: 1 and 1, 0 and 1/2, 1 and 1/2."""
    images = paint_images()
    row = make_evaluator().score_images("one photo", images)
    assert row.prompt_accuracy is not None and row.seconds is None
    assert row.prompt_accuracy.per_subject == (1, 0.25, 0.75)
    assert row.prompt_accuracy.standard_error == pytest.approx(stdev([1, 0.25, 0.75]) / sqrt(3))
    assert row.attribute_accuracy == pytest.approx({"hue": 4 / 6, "tone": 2 / 3})
    assert row.images == [images[0:2], images[2:4], images[4:6]]


def test_score_images_without_every_truth_has_identity_alone() -> None:
    prompts = (PROMPTS[0], Prompt("a sky", {}))
    row = make_evaluator(prompts).score_images("one photo", paint_images())
    assert row.prompt_accuracy is None and row.attribute_accuracy == {}
    expected = make_evaluator().score_images("one photo", paint_images())
    assert row.identity.per_subject == expected.identity.per_subject


@pytest.mark.parametrize("kind", ["one per subject", "one for all", "none"])
def test_evaluate_renders_each_prompt_with_the_lora_of_its_subject(kind: str) -> None:
    """Batches of 4 cut across the 2 prompts of 3 subjects; all LoRAs see the same noise."""
    options: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 30.0}
    evaluator = make_evaluator(**options, batch_size=4)
    layout = evaluator.base.make_layout("attention", 2)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, layout.numel, generator=generator)
    batch = LoraWeights.unflatten(layout, rows * 0.8)
    loras = {"one per subject": batch, "one for all": batch[1], "none": None}[kind]
    how: dict[str, Any] = {} if loras is None else {"seconds": 0.5, "role": "variant"}
    row = evaluator.evaluate("one photo", loras, **how)
    together = generate_images(
        evaluator.base,
        ["a red dog", "a sky"] * 3,
        batch[[0, 0, 1, 1, 2, 2]] if kind == "one per subject" else loras,
        seeds=[1000, 1001, 1002, 1003, 1004, 1005],
        **options,
    )
    images = [image for images in row.images for image in images]
    assert (stack_images(images) - stack_images(together)).abs().max() <= 2.1 / 255
    scores = evaluator.score_images("", images)
    assert row.identity.per_subject == scores.identity.per_subject
    seconds, role = (None, "control") if loras is None else (0.5, "variant")
    assert (row.name, row.seconds, row.role) == ("one photo", seconds, role)
