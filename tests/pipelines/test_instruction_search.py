"""Instructions that a network does not predict: searched with the base, on pairs of avatars."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_builder.avatars.instructions import build_vocabulary
from hyperlora import pretrained
from hyperlora.data.images import read_image
from hyperlora.diffusion.diffusion_base import DiffusionBase, PromptCache, load_diffusion_base
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines import instruction_search
from hyperlora.pipelines.instruction_search import InstructionSearch, search_pair_lora
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.pipelines.prompt_lora import encode_text
from hyperlora.prompt_blending import combine_blends
from hyperlora.service.engine.edits import EditEngine

CANDIDATES = ["no hat", "wearing a hat", "pale skin", "dark skin"]


@pytest.fixture(scope="module")
def base() -> DiffusionBase:
    return load_diffusion_base(pretrained.EDIT_BASE_DIR)


@pytest.fixture(scope="module")
def model(base: DiffusionBase) -> PairToLora:
    return PairToLora.from_pretrained(pretrained.PAIR_TO_LORA_DIR, base=base)


def find_pair(kind: str) -> tuple[Path, Path]:
    """Files of the pair of the benchmark's first edit of a kind."""
    edits = json.loads((pretrained.EDIT_BENCHMARK_DIR / "edits.json").read_text())
    name = next(edit["name"] for edit in edits if edit["kind"] == kind)
    folder = pretrained.EDIT_BENCHMARK_DIR / name
    before, after = (next(folder.glob(f"shown-0_{side}.*")) for side in ("before", "after"))
    return before, after


def load_pair(model: PairToLora, kind: str) -> Tensor:
    before, after = find_pair(kind)
    return model.stack_pairs([(read_image(before), read_image(after))], 128)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled with the prompts that LoRAs are substituted by."""
    prompts: list[str] = []
    substitute_prompts = instruction_search.substitute_prompts

    def record_prompts(
        base: DiffusionBase, texts: Sequence[str], loras: LoraWeights
    ) -> LoraWeights:
        prompts.extend(texts)
        return substitute_prompts(base, texts, loras)

    monkeypatch.setattr(instruction_search, "substitute_prompts", record_prompts)
    return prompts


def test_search_pair_lora_finds_candidate(
    model: PairToLora, base: DiffusionBase, prompts: list[str]
) -> None:
    pair = load_pair(model, "skin")
    lora = search_pair_lora(model, base, pair, CANDIDATES)
    assert len(prompts) == 1 and any(skin in prompts[0] for skin in CANDIDATES[2:])
    own_lora = model.forward(pair[None])[0]
    assert lora.layout == own_lora.layout and not lora.batch_shape
    index = next(i for i, t in enumerate(lora.layout.targets) if t.is_text_projection)
    layer = base.denoiser.get_submodule(lora.layout.targets[index].path)
    empty_embeds, prompt_embeds = (encode_text(base, [text])[0] for text in ("", prompts[0]))
    actual = empty_embeds @ (layer.weight + lora.up[index] @ lora.down[index]).mT
    expected = prompt_embeds @ layer.weight.mT
    initial_error = (empty_embeds @ layer.weight.mT - expected).norm()
    assert (actual - expected).norm() < 0.05 * initial_error


def test_search_pair_lora_keeps_good_prediction(
    model: PairToLora, base: DiffusionBase, prompts: list[str]
) -> None:
    for kind in ("background", "glasses", "garment_color"):
        pair = load_pair(model, kind)
        lora = search_pair_lora(model, base, pair, CANDIDATES)
        assert not prompts
        torch.testing.assert_close(lora.flatten(), model.forward(pair[None])[0].flatten())


@pytest.mark.parametrize(
    ("relative_errors", "expected"),
    [
        ({"predicted": 0.15, "b": 0.01}, "predicted"),  # needs no other
        ({"predicted": 0.6, "a": 0.3, "b": 0.2}, "b"),
        ({"predicted": 0.6, "a": 0.55}, "predicted"),  # little better
        ({"predicted": 0.9, "a": 0.6}, "predicted"),  # no explanation either
        (
            {"predicted": 0.6, "predicted+b": 0.1, "b": 0.2},
            combine_blends({"predicted": 1, "b": 1}),
        ),
    ],
)
def test_select_instruction_applies_thresholds(
    base: DiffusionBase,
    monkeypatch: pytest.MonkeyPatch,
    relative_errors: dict[str, float],
    expected: str,
) -> None:
    errors = {"": 2.0}
    for text, error in relative_errors.items():
        first, _, second = text.partition("+")
        errors[combine_blends({first: 1, second: 1}) if second else text] = 2 * error

    def look_up_errors(
        base: Any, before: Tensor, after: Tensor, texts: Sequence[str], cache: PromptCache
    ) -> Tensor:
        return torch.tensor([errors.get(text, 2.0) for text in texts])

    monkeypatch.setattr(instruction_search, "_compute_instruction_errors", look_up_errors)
    latents = torch.zeros(1, 4, 2, 2)
    selected = instruction_search._select_instruction(
        base, latents, latents, "predicted", ["a", "b"], {}
    )
    assert selected == expected


def test_search_of_files_matches_search_of_tensors(
    model: PairToLora, base: DiffusionBase, prompts: list[str]
) -> None:
    before, after = find_pair("skin")
    search = InstructionSearch(base, CANDIDATES)
    negative_lora = model((before, after), -0.5, search).weights
    swapped_lora = model((after, before), 0.5, search).weights
    torch.testing.assert_close(negative_lora.flatten(), swapped_lora.flatten())
    pair = load_pair(model, "skin")
    tensor_lora = search_pair_lora(model, base, pair.flip(1), CANDIDATES) * 0.5
    torch.testing.assert_close(tensor_lora.flatten(), negative_lora.flatten())
    assert len(prompts) == 3


def test_search_pair_lora_subtracts_undo_prompt(
    model: PairToLora, base: DiffusionBase, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    instructions = iter(["a", "b"])
    monkeypatch.setattr(
        instruction_search, "_select_instruction", lambda *arguments: next(instructions)
    )
    search_pair_lora(model, base, load_pair(model, "skin"), CANDIDATES)
    assert prompts == [combine_blends({"a": 1, "back to b": -1})]


def test_compute_instruction_errors_averages_pairs_and_splits_batches(
    model: PairToLora, base: DiffusionBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_errors = instruction_search._compute_instruction_errors
    pairs = torch.cat([load_pair(model, "skin"), load_pair(model, "glasses")])
    before, after = (base.encode_images(pairs[:, side]) for side in (0, 1))
    errors = compute_errors(base, before, after, CANDIDATES, {})
    monkeypatch.setattr(instruction_search, "_BATCH_SIZE", 3)
    torch.testing.assert_close(compute_errors(base, before, after, CANDIDATES, {}), errors)
    monkeypatch.setattr(
        instruction_search,
        "compute_edit_region_weights",
        lambda before, after, weight: torch.ones_like(after[:, :1]),
    )
    mean_errors = compute_errors(base, before, after, CANDIDATES, {})
    first_errors = compute_errors(base, before[:1], after[:1], CANDIDATES, {})
    # by the noise of the first pair
    second_errors = compute_errors(base, before.flip(0)[:1], after.flip(0)[:1], CANDIDATES, {})
    torch.testing.assert_close(
        mean_errors, (first_errors + second_errors) / 2, rtol=0.05, atol=1e-4
    )


def test_search_pair_lora_returns_zero_without_change(
    model: PairToLora, base: DiffusionBase, prompts: list[str]
) -> None:
    pair = load_pair(model, "skin")
    lora = search_pair_lora(model, base, pair[:, :1].expand_as(pair), CANDIDATES)
    assert lora.compute_delta_norms().max() < 1e-4 and not prompts


def test_search_pair_lora_applies_card_strength(model: PairToLora, base: DiffusionBase) -> None:
    pair, card = load_pair(model, "skin"), model.card
    lora = search_pair_lora(model, base, pair, CANDIDATES)
    model.card = replace(card, strength=2.0)
    try:
        doubled_lora = search_pair_lora(model, base, pair, CANDIDATES)
    finally:
        model.card = card
    torch.testing.assert_close(doubled_lora.flatten(), (lora * 2.0).flatten())


def test_search_pair_lora_without_candidates_is_one_pass(
    model: PairToLora, base: DiffusionBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instruction_search, "_compute_instruction_errors", None)
    pair = load_pair(model, "skin")
    lora = search_pair_lora(model, base, pair, [])
    torch.testing.assert_close(lora.flatten(), model.forward(pair[None])[0].flatten())


def test_edit_engine_searches_one_edit_at_a_time(model: PairToLora, base: DiffusionBase) -> None:
    engine, pair = EditEngine(model, base), load_pair(model, "skin")
    assert engine.max_lora_batch == 1
    lora = model.generate(pair[None], engine.search)[0]
    torch.testing.assert_close(lora.flatten(), search_pair_lora(model, base, pair).flatten())
    assert not torch.allclose(lora.flatten(), model.forward(pair[None])[0].flatten(), atol=1e-3)


def test_zero_shot_prompts_are_those_of_the_avatar_vocabulary(model: PairToLora) -> None:
    assert list(model.zero_shot_prompts) == build_vocabulary()["zero_shot_prompts"]
