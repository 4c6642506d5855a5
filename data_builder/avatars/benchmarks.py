"""The avatar benchmark: photos of people of one split, and prompts with known truth."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from data_builder.avatars.captions import prompt
from data_builder.avatars.edits import (
    EXACT,
    KINDS,
    UNSEEN_KINDS,
    UNSEEN_TOGETHER,
    UNSEEN_VALUE,
    Change,
    Pair,
    asked,
    change,
    pair,
)
from data_builder.avatars.identity import SPLITS, Scene, hidden, identity, scene
from data_builder.avatars.rendering import draw
from data_builder.avatars.vocabulary import IDENTITY_ATTRIBUTES, PROMPT_ATTRIBUTES

SCENES: Final = (
    Scene("smiling", "open", "none", "hoodie", "red", "sky"),
    Scene("serious", "open", "sunglasses", "t-shirt", "black", "orange"),
    Scene("laughing", "happy", "none", "tuxedo", "white", "gray"),
    Scene("sad", "closed", "round glasses", "sweater", "green", "pink"),
    Scene("screaming", "surprised", "none", "overall", "blue", "white"),
    Scene("neutral", "winking", "eyepatch", "blazer", "purple", "green"),
    Scene("tongue out", "open", "none", "v-neck", "yellow", "purple"),
    Scene("grimacing", "side", "glasses", "spacesuit", "white", "blue"),
)
_ASKED: Final = ("expression", "eyes", "glasses", "garment", "garment_color", "background")


def write_benchmark(out: Path, split: str = "test", people: int = 64, photos: int = 8) -> None:
    """``out/subjects/NAME/K.png`` and ``out/prompts.json`` as ``hyperlora.evaluation.benchmark`` reads them."""
    for seed in SPLITS[split][:people]:
        folder = out / "subjects" / f"person-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(photos):
            plain = replace(scene(seed, k), hat="none", style="plain")
            draw(identity(seed), plain).save(folder / f"{k}.webp", lossless=True, method=6)
    prompts = [{"prompt": prompt(s), "truth": _truth(s)} for s in SCENES]
    (out / "prompts.json").write_text(json.dumps(prompts, indent=1))


def _truth(asked: Scene) -> dict[str, str]:
    """What the evaluator should read: of what was asked, all that can be seen."""
    unseen = hidden(asked)
    return {name: str(getattr(asked, name)) for name in _ASKED if name not in unseen}


SEEN: Final = "seen kinds"
COMBINED: Final = "unseen combinations"
UNSEEN: Final = "unseen kinds"
UNSEEN_EVERYWHERE: Final = "unseen by the edit base too"


def write_edit_benchmark(out: Path, split: str = "test", each: int = 3, others: int = 3, shown: int = 2) -> None:
    """``out`` as ``hyperlora.evaluation.edit_benchmark`` reads it: ``each`` edits of every kind (and of every unseen
    combination, and of the unseen value), each shown on ``shown`` people and asked for on ``others`` more."""
    facts = []
    for number, (group, name, changes) in enumerate(_edits(each)):
        seeds = SPLITS[split][number * (others + shown) : (number + 1) * (others + shown)]
        pairs = [pair((identity(seed), scene(seed, 0)), changes) for seed in seeds]
        folder = out / f"{number:03d}-{name.replace(' ', '-')}"
        folder.mkdir(parents=True, exist_ok=True)
        for i, drawn in enumerate(pairs):
            stem = f"shown-{i}" if i < shown else f"other-{i - shown}"
            for side, portrait in (("before", drawn.before), ("after", drawn.after)):
                draw(*portrait).save(folder / f"{stem}_{side}.webp", lossless=True, method=6)
        facts.append({
            "name": folder.name, "kind": name, "group": group, "instruction": pairs[0].instruction,
            "truth": _edit_truth(pairs[0]),
        } | _blend(changes))  # fmt: skip
    (out / "edits.json").write_text(json.dumps(facts, indent=1))


def _edits(each: int) -> Iterator[tuple[str, str, tuple[Change, ...]]]:
    """(group, kind, changes), the first of every kind before the second of any."""
    for round_ in range(each):
        rng = np.random.default_rng([20261124, round_])
        for kind in KINDS:
            yield (UNSEEN if kind in UNSEEN_KINDS else SEEN), kind, (change(rng, kind),)
        for kinds in UNSEEN_TOGETHER:
            one, other = sorted(kinds)
            yield COMBINED, f"{one} + {other}", (change(rng, one), change(rng, other))
        attribute, value = UNSEEN_VALUE
        yield UNSEEN_EVERYWHERE, value, (Change(attribute, "plain", value),)


def _blend(changes: tuple[Change, ...]) -> dict[str, str]:
    """The words for what no single word names, if there is any."""
    words = asked([(c.attribute, c.after) for c in changes])
    return {"blend": words} if any(c.kind.startswith(EXACT) for c in changes) else {}


def _edit_truth(drawn: Pair) -> dict[str, str]:
    """What the evaluator should read in the answers: of what changes, all that has a name and can be seen."""
    known = IDENTITY_ATTRIBUTES | PROMPT_ATTRIBUTES
    unseen = hidden(drawn.after[1])
    return {
        c.attribute: c.after
        for c in drawn.changes
        if c.attribute in known and c.attribute not in unseen and not c.kind.startswith(EXACT)
    }
