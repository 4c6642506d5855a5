"""LoRAs from before/after pairs: opposite pairs, several pairs, saved models, checks of a pair."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hyperlora.data.images import to_image
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.evaluation.edit_benchmark import load_edit_benchmark
from hyperlora.evaluation.edit_evaluator import EditEvaluator
from hyperlora.evaluation.edit_suite import evaluate_edit_suite
from hyperlora.models.pair_hypernetwork import PairHypernetwork
from hyperlora.pipelines.input_checks import check_pair
from hyperlora.pipelines.model_card import ModelCard
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.pipelines.prompt_lora import encode_text, set_instruction_texts


@pytest.fixture(scope="module")
def base(bundle: Any) -> DiffusionBase:
    return load_diffusion_base(bundle.edit_base)


@pytest.fixture(scope="module")
def model(bundle: Any, base: DiffusionBase) -> PairToLora:
    return PairToLora.from_pretrained(bundle.pair_model, base=base)


@pytest.fixture
def instruction_model(base: DiffusionBase, model: PairToLora) -> PairToLora:
    """A model whose network has an instruction head, with random weights."""
    num_text_tokens, cross_attention_dim = encode_text(base, [""]).shape[1:]
    instruction_head = {
        "num_text_tokens": num_text_tokens,
        "cross_attention_dim": cross_attention_dim,
        "hidden_size": 24,
        "vocabulary": {
            "categories": {"light": ["dark", "bright"]},
            "color_axes": {"sky": ["black", "red"]},
            "zero_shot_prompts": ["red"],
        },
    }
    network = PairHypernetwork(
        model.layout,
        model.encoder.width,
        antisymmetric=True,
        instruction_head=instruction_head,
        width=16,
        depth=1,
        num_heads=2,
        head_options={"size": 4},
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    set_instruction_texts(network, base)
    card = ModelCard(resolution=16, num_inference_steps=2)
    return PairToLora(model.encoder, network, card).eval()


def get_pair(bundle: Any, number: int = 0, edit: str = "inverted") -> tuple[Path, Path]:
    folder = bundle.edit_benchmark / edit
    return folder / f"shown-{number}_before.png", folder / f"shown-{number}_after.png"


def make_blocks(seed: int, side: int = 12) -> Image.Image:
    blocks = torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed))
    return to_image(blocks.repeat_interleave(120 // side, 1).repeat_interleave(120 // side, 2))


def test_pair_to_lora_negates_lora_of_swapped_pair(bundle: Any, model: PairToLora) -> None:
    before, after = get_pair(bundle)
    lora = model((before, after)).weights
    reversed_lora = model([(after, before)]).weights
    torch.testing.assert_close(
        torch.cat([delta.flatten() for delta in lora.get_delta_weights()]),
        -torch.cat([delta.flatten() for delta in reversed_lora.get_delta_weights()]),
        atol=1e-5,
        rtol=1e-3,
    )
    norms = lora.compute_delta_norms()
    assert norms.max() > 100 * model((before, before)).weights.compute_delta_norms().max()
    half_norms = model((before, after), strength=0.5).weights.compute_delta_norms()
    torch.testing.assert_close(half_norms, norms * 0.5)


def test_pair_to_lora_makes_one_lora_of_several_pairs(bundle: Any, model: PairToLora) -> None:
    pairs = [get_pair(bundle, 0), get_pair(bundle, 1)]
    lora = model(pairs).weights
    assert lora.batch_shape == ()
    assert not torch.equal(lora.flatten(), model(pairs[0]).weights.flatten())
    reordered = model(pairs[::-1]).weights
    torch.testing.assert_close(reordered.flatten(), lora.flatten(), atol=1e-5, rtol=1e-4)


def test_pair_to_lora_refuses_unequal_sizes_and_no_pair(model: PairToLora) -> None:
    wide, tall = Image.new("RGB", (20, 10)), Image.new("RGB", (10, 20))
    with pytest.raises(
        InvalidArgumentError, match="20×10, the one after 10×20: the same size is expected"
    ):
        model((wide, tall))
    with pytest.raises(InvalidArgumentError, match="no pair given"):
        model([])


def test_from_pretrained_refuses_model_of_another_class(bundle: Any) -> None:
    with pytest.raises(ModelLoadError, match=r"ImageToLora|PairToLora"):
        PairToLora.from_pretrained(bundle.model)


def test_pair_to_lora_with_instruction_head_survives_saving(
    bundle: Any, base: DiffusionBase, instruction_model: PairToLora, tmp_path: Path
) -> None:
    instruction_model.save_pretrained(tmp_path / "model")
    loaded_model = PairToLora.from_pretrained(tmp_path / "model", base=base)
    lora = instruction_model(get_pair(bundle)).weights
    loaded_lora = loaded_model(get_pair(bundle)).weights
    assert lora.layout == loaded_lora.layout == instruction_model.layout
    deltas = zip(lora.get_delta_weights(), loaded_lora.get_delta_weights(), strict=True)
    for delta, loaded_delta in deltas:  # saved in half precision
        atol = 0.02 * float(delta.abs().max())
        torch.testing.assert_close(delta, loaded_delta, rtol=0.02, atol=atol)
    image = Image.open(get_pair(bundle)[0])
    unchanged_norms = loaded_model((image, image)).weights.compute_delta_norms()
    assert unchanged_norms.max() < 1e-4 * loaded_lora.compute_delta_norms().max()
    assert list(loaded_model.zero_shot_prompts) == ["red"]


def test_negative_strength_equals_swapped_pair(bundle: Any, instruction_model: PairToLora) -> None:
    before, after = get_pair(bundle)
    lora = instruction_model((before, after), 0.5).weights.flatten()
    negative_lora = instruction_model((before, after), -0.5).weights.flatten()
    swapped_lora = instruction_model((after, before), 0.5).weights.flatten()
    torch.testing.assert_close(negative_lora, swapped_lora)
    assert not torch.allclose(negative_lora, -lora, atol=1e-4)


def test_evaluate_edit_suite_adds_instruction_rows(
    bundle: Any, base: DiffusionBase, instruction_model: PairToLora
) -> None:
    benchmark = load_edit_benchmark(bundle.edit_benchmark, 16, 1)
    classifier = AttributeClassifier.from_pretrained(bundle.evaluator)
    evaluator = EditEvaluator(base, classifier, benchmark, 1)
    names = {result.name for result in evaluate_edit_suite(evaluator, instruction_model)}
    assert {
        "text instruction as LoRA",
        "one pair",
        "one pair + instruction search",
        "one pair + instruction search + background preserved",
    } < names


def test_check_pair_doubts_equal_and_unrelated_images() -> None:
    image = make_blocks(0)
    assert check_pair(image, image.point(lambda x: 255 - x)) == []
    assert "no change found" in check_pair(image, image.copy())[0]
    assert "unrelated" in check_pair(image, make_blocks(1, 5))[0]


def test_check_pair_finds_no_change_in_jpeg_copy(tmp_path: Path) -> None:
    smooth = make_blocks(0).resize((30, 30)).resize((120, 120), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg", quality=85)
    jpeg = Image.open(tmp_path / "a.jpg")
    jpeg.save(tmp_path / "b.jpg", quality=80)
    jpeg_copy = Image.open(tmp_path / "b.jpg")
    assert "no change found" in check_pair(jpeg.convert("RGB"), jpeg_copy.convert("RGB"))[0]
