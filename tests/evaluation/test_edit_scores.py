"""Each score of an edit by hand, on images of few pixels; edits are rendered as if alone."""

from math import log10
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.data.images import stack_images
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.image_editing import edit_images
from hyperlora.evaluation.edit_benchmark import Edit, EditBenchmark
from hyperlora.evaluation.edit_evaluator import EditEvaluator, EditResult
from hyperlora.lora.weights import LoraWeights
from tests.evaluation.color_classifier import make_color_classifier, paint
from tests.tiny_pipelines import get_tiny_pipeline

EXAMPLE_PAIRS = torch.stack(
    [paint((0.2, 0.4, 0.6), (0.6, 0.4, 0.4)), paint((0.9, 0.1, 0.1), (0.1, 0.8, 0.3))]
)  # of which the first counts


def make_row(*colors: tuple[float, float, float]) -> Tensor:
    """Make an image [3, 1, w] of one row of pixels."""
    return torch.tensor(colors).T[:, None]


def make_evaluator(*edits: Edit, base: Any = None, **options: Any) -> EditEvaluator:
    return EditEvaluator(base, make_color_classifier(), EditBenchmark(edits), **options)


def score_image(source: Tensor, target: Tensor, image: Tensor) -> dict[str, float]:
    """Score one edited image of an edit without attributes."""
    edit = Edit("a", EXAMPLE_PAIRS, torch.stack([source, target])[None])
    row = make_evaluator(edit).score_images("a", image[None])
    return {name: value.item() for name, value in row.values.items()}


SOURCE = make_row((0, 0, 0), (0.5, 0.5, 0.5), (0.2, 0.4, 0.6))
TARGET = make_row((0.6, 0, 0), (0.5, 0.5, 0.9), (0.2, 0.4, 0.6))  # changes the first two pixels
IMAGE = make_row((0.3, 0, 0.1), (0.5, 0.7, 0.9), (0.2, 0.7, 0.6))


def compute_cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5


def test_score_images_compares_pixels_with_the_target() -> None:
    scores = score_image(SOURCE, TARGET, IMAGE)
    initial_error, error = (0.6 + 0.4) / 6, (0.3 + 0.1 + 0.2) / 6  # of two pixels in three colors
    assert scores["edit_progress"] == pytest.approx(1 - error / initial_error)
    assert scores["background_l1"] == pytest.approx(0.3 / 3)
    mean_squared_error = (0.3**2 + 0.1**2 + 0.2**2 + 0.3**2) / 9
    assert scores["psnr"] == pytest.approx(-10 * log10(mean_squared_error))


def test_background_is_that_of_each_image() -> None:
    """One of three pixels changes in the first pair, all in the second, none in the third."""
    sources = torch.zeros(3, 3, 1, 3)
    targets = sources.clone()
    targets[0, ..., :1] = targets[1] = 0.5
    images = torch.zeros(3, 3, 1, 3)
    images[0, ..., 1:] = torch.tensor([0.2, 0.4])
    images[2] = 0.1
    edit = Edit("a", EXAMPLE_PAIRS, torch.stack([sources, targets], 1))
    row = make_evaluator(edit).score_images("a", images)
    assert row.values["background_l1"].item() == pytest.approx((0.3 + 0.0 + 0.1) / 3)


def test_score_images_compares_features_with_the_first_example() -> None:
    """Means of the three colors, times 3."""
    scores = score_image(SOURCE, TARGET, IMAGE)
    source, target, image = [0.7, 0.9, 1.1], [1.3, 0.9, 1.5], [1.0, 1.4, 1.6]
    change = [b - a for a, b in zip(source, image, strict=True)]
    example_output, example_change = [0.6, 0.4, 0.4], [0.4, 0.0, -0.2]
    expected = compute_cosine(change, example_change)
    assert scores["directional_similarity"] == pytest.approx(expected, abs=1e-5)
    expected = compute_cosine(image, example_output) - compute_cosine(target, example_output)
    assert scores["leakage"] == pytest.approx(expected, abs=1e-5)


def test_score_images_of_exact_results() -> None:
    scores = score_image(SOURCE, TARGET, TARGET)
    assert scores["edit_progress"] == 1 and scores["background_l1"] == 0
    assert scores["psnr"] == pytest.approx(80) and scores["leakage"] == 0


@pytest.mark.parametrize(("change", "is_edited"), [(0.04, False), (0.041, True)])
def test_pixels_are_edited_by_a_change_above_4_percent(change: float, is_edited: bool) -> None:
    """The image misses all of a change of one color; outside the edited region that is an error."""
    source, target = make_row((0, 0, 0), (0.5, 0, 0)), make_row((0, change, 0), (0.5, 0, 0))
    scores = score_image(source, target, source)
    assert scores["edit_progress"] == (0 if is_edited else 1)
    assert scores["background_l1"] == pytest.approx(0 if is_edited else change / 6)


def test_background_error_is_0_without_background() -> None:
    scores = score_image(SOURCE[..., :2], TARGET[..., :2], IMAGE[..., :2])
    assert scores["background_l1"] == 0 and scores["edit_progress"] == pytest.approx(0.4)


RED, GREEN, BLUE = (0.6, 0.0, 0.3), (0.0, 0.6, 0.3), (0.3, 0.0, 0.6)  # dark; only red is warm


def make_edit(kind: str, truth: dict[str, str], *pairs: tuple[Any, Any], **options: Any) -> Edit:
    test_pairs = torch.stack([paint(*pair) for pair in pairs])
    return Edit(kind, EXAMPLE_PAIRS, test_pairs, kind, truth=truth, **options)


def test_score_images_averages_attributes_over_the_images_of_each_edit() -> None:
    """Complete truth; half of a truth, which needs progress; all attributes; none."""
    evaluator = make_evaluator(
        make_edit("hue", {"hue": "blue"}, (RED, BLUE), (RED, BLUE), (GREEN, BLUE)),
        make_edit("hue + tone", {"hue": "green"}, (RED, GREEN), (RED, GREEN)),
        make_edit("all", {"hue": "red", "tone": "dark", "warmth": "warm"}, (BLUE, RED)),
        make_edit("style", {}, (RED, GREEN)),
    )
    images = paint(
        (0.1, 0.0, 0.2),  # blue, dark, cold as the target
        (0.8, 0.7, 0.9),  # blue and cold, but bright
        (0.9, 0.8, 0.7),  # red, bright and warm
        (0.1, 0.5, 0.3),  # 5/6 of the way to green; dark and cold as the target
        (0.25, 0.35, 0.2),  # 7/12 of the way, and warm
        (0.9, 0.1, 0.3),  # red, dark, warm
        (0.59, 0.0, 0.3),  # no attribute, no progress: red and warm, where the target is neither
    )
    row = evaluator.score_images("a", images, seconds=2.5)
    assert row.values["accuracy"].tolist() == pytest.approx([2 / 3, 1 / 2, 1, 0])
    preservation = [(1 + 1 / 2 + 0) / 3, (1 + 1 / 2) / 2, 1, 1 / 3]
    assert row.values["preservation"].tolist() == pytest.approx(preservation)
    progress = row.values["edit_progress"]
    assert progress[1].item() == pytest.approx((5 / 6 + 1 - (0.25 + 0.25 + 0.1) / 1.2) / 2)
    assert (row.name, row.seconds) == ("a", 2.5) and torch.equal(row.images, images)
    assert row.edits == evaluator.benchmark.edits


def test_edit_result_selects_groups_and_kinds() -> None:
    pairs = ((RED, BLUE),)
    edits = [
        make_edit(kind, {}, *pairs, group=group)
        for kind, group in (("hat", "seen"), ("tone", "unseen"), ("hat", "unseen"))
    ]
    values = {"psnr": torch.tensor([1.0, 2.0, 7.0]), "leakage": torch.zeros(3)}
    row = EditResult("a", values, edits, torch.zeros(3, 3, 2, 2))
    assert row.compute_score("psnr").per_subject == (1, 2, 7)
    assert row.compute_score("psnr", "unseen").per_subject == (2, 7)
    assert row.compute_score("psnr", "seen").per_subject == (1,)
    assert row.compute_mean_by_kind("psnr") == {"hat": 4, "tone": 2}
    with pytest.raises(ValueError, match="zip"):
        EditResult("a", values, edits[:2], row.images).compute_mean_by_kind("psnr")


IMAGE_EDITS = ("red", "red", "sad", "old", "old", "old")


@pytest.fixture(scope="module")
def evaluator() -> EditEvaluator:
    """Three edits with 2, 1 and 3 images, rendered in batches of 4."""
    base = DiffusionBase("tiny/edit-base", get_tiny_pipeline("instruct_pix2pix").pipe)
    generator = torch.Generator().manual_seed(0)
    edits = [
        Edit(
            name,
            EXAMPLE_PAIRS,
            torch.rand(count, 2, 3, 32, 32, generator=generator),
            instruction=f"make it {name}",
        )
        for name, count in (("red", 2), ("sad", 1), ("old", 3))
    ]
    return make_evaluator(*edits, base=base, num_inference_steps=1, batch_size=4)


def test_reconstruct_images_encodes_and_decodes(evaluator: EditEvaluator) -> None:
    base, images = evaluator.base, evaluator.targets
    expected = base.decode_latents(base.encode_images(images))
    assert not torch.allclose(expected, images, atol=0.05)
    torch.testing.assert_close(evaluator.vae_round_trip, expected, atol=1e-5, rtol=1e-5)
    assert evaluator.reconstruct_images(images.double()).dtype == torch.float64
    assert not evaluator.vae_round_trip.requires_grad


@pytest.mark.parametrize("kind", ["one per edit", "one for all", "none"])
def test_evaluate_edits_each_image_with_the_lora_of_its_edit(
    kind: str, evaluator: EditEvaluator
) -> None:
    layout = evaluator.base.make_layout("attention", 2)
    rows = torch.randn(3, layout.numel, generator=torch.Generator().manual_seed(1))
    batch = LoraWeights.unflatten(layout, rows)
    loras = {"one per edit": batch, "one for all": batch[1], "none": None}[kind]
    has_prompts = kind != "one for all"
    options: dict[str, Any] = {}
    if has_prompts:
        options = {"prompt_fn": get_instruction, "guidance_scale": 4.0}
    row = evaluator.evaluate("all", loras, seconds=0.5, **options)
    together = edit_images(
        evaluator.base,
        torch.cat([edit.test_pairs[:, 0] for edit in evaluator.benchmark.edits]),
        batch[[0, 0, 1, 2, 2, 2]] if kind == "one per edit" else loras,
        seeds=[1000, 1001, 1002, 1003, 1004, 1005],
        instructions=[f"make it {name}" if has_prompts else "" for name in IMAGE_EDITS],
        num_inference_steps=1,
        guidance_scale=4.0 if has_prompts else 1.0,
    )
    assert (row.images - stack_images(together)).abs().max() <= 2.1 / 255
    scores = evaluator.score_images("all", row.images)
    assert all(torch.equal(row.values[name], scores.values[name]) for name in scores.values)
    assert (row.name, row.seconds, scores.seconds) == ("all", 0.5, None)


def get_instruction(edit: Edit) -> str:
    return edit.instruction


def test_edits_have_no_guidance_by_default(evaluator: EditEvaluator) -> None:
    images, options = evaluator.inputs, {"prompt_fn": get_instruction}
    rendered = evaluator.render_edits("all", None, images, get_instruction)
    unguided = evaluator.render_edits("all", None, images, get_instruction, guidance_scale=1.0)
    assert torch.equal(rendered, unguided)
    row = evaluator.evaluate("all", None, **options)
    assert torch.equal(row.images, unguided) and row.seconds is None
