"""Words that a network cannot say: tried by the base, on pairs of the embedded world."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora import bundle
from hyperlora.blends import told
from hyperlora.data import read_image
from hyperlora.pipelines import Base, PairToLora, load_base, trying
from hyperlora.pipelines.trying import lora_of_pairs, tried
from hyperlora.pipelines.wording import text_of

HATS = ["no hat", "wearing a hat", "pale skin", "dark skin"]


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(bundle.EDIT_BASE)


@pytest.fixture(scope="module")
def model(base: Base) -> PairToLora:
    return PairToLora.from_pretrained(bundle.PAIR_MODEL, base=base)


def shown(model: PairToLora, kind: str) -> Tensor:
    """The pair of the benchmark's first edit of a kind."""
    facts = json.loads((bundle.EDIT_BENCHMARK / "edits.json").read_text())
    folder = bundle.EDIT_BENCHMARK / next(f["name"] for f in facts if f["kind"] == kind)
    before, after = (next(folder.glob(f"shown-0_{side}.*")) for side in ("before", "after"))
    return model.seen([(read_image(before), read_image(after))])


def what_is_said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled with what LoRAs are made to say."""
    texts: list[str] = []
    saying = trying.saying
    monkeypatch.setattr(trying, "saying", lambda base, said, lora: (texts.extend(said), saying(base, said, lora))[1])
    return texts


def test_what_the_network_cannot_say_is_found(model: PairToLora, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, pair = what_is_said(monkeypatch), shown(model, "skin")
    lora = lora_of_pairs(model, base, pair, HATS)
    assert len(texts) == 1 and any(skin in texts[0] for skin in HATS[2:])
    own = model.forward(pair[None])[0]
    assert lora.layout == own.layout and not lora.batch
    site = base.denoiser.get_submodule(next(s.path for s in lora.layout.sites if s.reads_text))
    place = next(i for i, s in enumerate(lora.layout.sites) if s.reads_text)
    empty, meant = (text_of(base, [text])[0] for text in ("", texts[0]))
    read = empty @ (site.weight + lora.up[place] @ lora.down[place]).mT
    wanted = meant @ site.weight.mT
    assert (read - wanted).norm() < 0.05 * (empty @ site.weight.mT - wanted).norm()


def test_what_the_network_explains_stays(model: PairToLora, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = what_is_said(monkeypatch)
    for kind in ("background", "glasses", "garment_color"):
        pair = shown(model, kind)
        lora = lora_of_pairs(model, base, pair, HATS)
        assert not texts
        torch.testing.assert_close(lora.flatten(), model.forward(pair[None])[0].flatten())


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ({"said": 0.15, "b": 0.01}, "said"),  # needs no other
        ({"said": 0.6, "a": 0.3, "b": 0.2}, "b"),
        ({"said": 0.6, "a": 0.55}, "said"),  # little better
        ({"said": 0.9, "a": 0.6}, "said"),  # no explanation either
        ({"said": 0.6, "said+b": 0.1, "b": 0.2}, told({"said": 1, "b": 1, "": -1})),
    ],
)
def test_which_words_are_said(
    base: Base, monkeypatch: pytest.MonkeyPatch, left: dict[str, float], expected: str
) -> None:
    errors = {"": 2.0, **{told({"said": 1, k[5:]: 1, "": -1}) if "+" in k else k: 2 * v for k, v in left.items()}}

    def of(base: Any, before: Tensor, after: Tensor, texts: Sequence[str]) -> Tensor:
        return torch.tensor([errors.get(text, 2.0) for text in texts])

    monkeypatch.setattr(trying, "_errors", of)
    latents = torch.zeros(1, 4, 2, 2)
    assert trying._explaining(base, latents, latents, "said", ["a", "b"]) == expected


def test_a_strength_below_0_tries_the_pair_turned_round(model: PairToLora, base: Base) -> None:
    folder = next(bundle.EDIT_BENCHMARK.glob("*-skin"))
    before, after = (next(folder.glob(f"shown-0_{side}.*")) for side in ("before", "after"))
    undoing = tried(model, base, (before, after), -0.5, HATS)
    turned = tried(model, base, (after, before), 0.5, HATS)
    torch.testing.assert_close(undoing.flatten(), turned.flatten())


def test_without_further_words_it_is_one_pass(model: PairToLora, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trying, "_errors", None)
    pair = shown(model, "skin")
    lora = lora_of_pairs(model, base, pair, [])
    torch.testing.assert_close(lora.flatten(), model.forward(pair[None])[0].flatten())
