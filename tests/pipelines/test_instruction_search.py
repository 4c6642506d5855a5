"""Words that a network cannot say: tried by the base, on pairs of the embedded world."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from data_builder.avatars.instructions import build_vocabulary
from hyperlora import pretrained
from hyperlora.data.images import read_image
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.pipelines import instruction_search
from hyperlora.pipelines.instruction_search import generate_with_search, search_pair_lora
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.pipelines.prompt_lora import encode_text
from hyperlora.prompt_blending import combine_blends
from hyperlora.service.engine.edits import EditEngine

HATS = ["no hat", "wearing a hat", "pale skin", "dark skin"]


@pytest.fixture(scope="module")
def base() -> DiffusionBase:
    return load_diffusion_base(pretrained.EDIT_BASE_DIR)


@pytest.fixture(scope="module")
def model(base: DiffusionBase) -> PairToLora:
    return PairToLora.from_pretrained(pretrained.PAIR_TO_LORA_DIR, base=base)


def shown(model: PairToLora, kind: str) -> Tensor:
    """The pair of the benchmark's first edit of a kind."""
    facts = json.loads((pretrained.EDIT_BENCHMARK_DIR / "edits.json").read_text())
    folder = pretrained.EDIT_BENCHMARK_DIR / next(f["name"] for f in facts if f["kind"] == kind)
    before, after = (next(folder.glob(f"shown-0_{side}.*")) for side in ("before", "after"))
    return model.stack_pairs([(read_image(before), read_image(after))], 128)


def what_is_said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled with what LoRAs are made to say."""
    texts: list[str] = []
    saying = instruction_search.saying
    monkeypatch.setattr(
        instruction_search,
        "saying",
        lambda base, said, lora: (texts.extend(said), saying(base, said, lora))[1],
    )
    return texts


def test_what_the_network_cannot_say_is_found(
    model: PairToLora, base: DiffusionBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, pair = what_is_said(monkeypatch), shown(model, "skin")
    lora = search_pair_lora(model, base, pair, HATS)
    assert len(texts) == 1 and any(skin in texts[0] for skin in HATS[2:])
    own = model.forward(pair[None])[0]
    assert lora.layout == own.layout and not lora.batch_shape
    site = base.denoiser.get_submodule(
        next(s.path for s in lora.layout.targets if s.is_text_projection)
    )
    place = next(i for i, s in enumerate(lora.layout.targets) if s.is_text_projection)
    empty, meant = (encode_text(base, [text])[0] for text in ("", texts[0]))
    read = empty @ (site.weight + lora.up[place] @ lora.down[place]).mT
    wanted = meant @ site.weight.mT
    assert (read - wanted).norm() < 0.05 * (empty @ site.weight.mT - wanted).norm()


def test_what_the_network_explains_stays(
    model: PairToLora, base: DiffusionBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = what_is_said(monkeypatch)
    for kind in ("background", "glasses", "garment_color"):
        pair = shown(model, kind)
        lora = search_pair_lora(model, base, pair, HATS)
        assert not texts
        torch.testing.assert_close(lora.flatten(), model.forward(pair[None])[0].flatten())


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ({"said": 0.15, "b": 0.01}, "said"),  # needs no other
        ({"said": 0.6, "a": 0.3, "b": 0.2}, "b"),
        ({"said": 0.6, "a": 0.55}, "said"),  # little better
        ({"said": 0.9, "a": 0.6}, "said"),  # no explanation either
        ({"said": 0.6, "said+b": 0.1, "b": 0.2}, combine_blends({"said": 1, "b": 1})),
    ],
)
def test_which_words_are_said(
    base: DiffusionBase, monkeypatch: pytest.MonkeyPatch, left: dict[str, float], expected: str
) -> None:
    errors = {
        "": 2.0,
        **{
            combine_blends({"said": 1, k[5:]: 1}) if "+" in k else k: 2 * v for k, v in left.items()
        },
    }

    def of(base: Any, before: Tensor, after: Tensor, texts: Sequence[str], known: Any) -> Tensor:
        return torch.tensor([errors.get(text, 2.0) for text in texts])

    monkeypatch.setattr(instruction_search, "_errors", of)
    latents = torch.zeros(1, 4, 2, 2)
    assert (
        instruction_search._select_instruction(base, latents, latents, "said", ["a", "b"], {})
        == expected
    )


def test_files_are_tried_as_tensors_are_and_turned_round(
    model: PairToLora, base: DiffusionBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, pair = what_is_said(monkeypatch), shown(model, "skin")
    folder = next(pretrained.EDIT_BENCHMARK_DIR.glob("*-skin"))
    before, after = (next(folder.glob(f"shown-0_{side}.*")) for side in ("before", "after"))
    undoing, turned = (
        generate_with_search(model, base, (before, after), -0.5, HATS),
        generate_with_search(model, base, (after, before), 0.5, HATS),
    )
    torch.testing.assert_close(undoing.flatten(), turned.flatten())
    torch.testing.assert_close(
        (search_pair_lora(model, base, pair.flip(1), HATS) * 0.5).flatten(), undoing.flatten()
    )
    assert len(texts) == 3


def test_the_way_back_is_said_too(
    model: PairToLora, base: DiffusionBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, pair = what_is_said(monkeypatch), shown(model, "skin")
    found = iter(["a", "b"])
    monkeypatch.setattr(instruction_search, "_explaining", lambda *given: next(found))
    search_pair_lora(model, base, pair, HATS)
    assert texts == [combine_blends({"a": 1, "back to b": -1})]


def test_several_pairs_in_parts_as_one_by_one(
    model: PairToLora, base: DiffusionBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = torch.cat([shown(model, "skin"), shown(model, "glasses")])
    a, b = (base.encode_images(pairs[:, side]) for side in (0, 1))
    whole = instruction_search._compute_instruction_errors(base, a, b, HATS, {})
    monkeypatch.setattr(instruction_search, "_AT_ONCE", 3)
    torch.testing.assert_close(
        instruction_search._compute_instruction_errors(base, a, b, HATS, {}), whole
    )
    monkeypatch.setattr(
        instruction_search, "edit_weight", lambda before, after, most: torch.ones_like(after[:, :1])
    )
    both, alone = (
        instruction_search._compute_instruction_errors(base, a, b, HATS, {}),
        instruction_search._compute_instruction_errors(base, a[:1], b[:1], HATS, {}),
    )
    other = instruction_search._compute_instruction_errors(
        base, a.flip(0)[:1], b.flip(0)[:1], HATS, {}
    )  # by the other's noise
    torch.testing.assert_close(both, (alone + other) / 2, rtol=0.05, atol=1e-4)


def test_nothing_is_said_of_no_change(
    model: PairToLora, base: DiffusionBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, pair = what_is_said(monkeypatch), shown(model, "skin")
    assert (
        search_pair_lora(model, base, pair[:, :1].expand_as(pair), HATS).compute_delta_norms().max()
        < 1e-4
        and not texts
    )


def test_the_strength_of_the_card_counts_for_words_too(
    model: PairToLora, base: DiffusionBase
) -> None:
    pair = shown(model, "skin")
    once = search_pair_lora(model, base, pair, HATS)
    model.card["strength"] = 2.0
    try:
        torch.testing.assert_close(
            search_pair_lora(model, base, pair, HATS).flatten(), (once * 2.0).flatten()
        )
    finally:
        del model.card["strength"]


def test_without_further_words_it_is_one_pass(
    model: PairToLora, base: DiffusionBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instruction_search, "_errors", None)
    pair = shown(model, "skin")
    lora = search_pair_lora(model, base, pair, [])
    torch.testing.assert_close(lora.flatten(), model.forward(pair[None])[0].flatten())


def test_a_server_tries_words_for_one_edit_at_a_time(
    model: PairToLora, base: DiffusionBase
) -> None:
    changes, pair = EditEngine(model, base), shown(model, "skin")
    assert changes.max_lora_batch == 1
    (lora,) = changes._predict_batch([pair])
    torch.testing.assert_close(lora.flatten(), search_pair_lora(model, base, pair).flatten())
    assert not torch.allclose(lora.flatten(), model.forward(pair[None])[0].flatten(), atol=1e-3)


def test_the_bundle_tries_what_its_networks_are_not_shown(model: PairToLora) -> None:
    assert list(model.zero_shot_prompts) == build_vocabulary()["further"]
