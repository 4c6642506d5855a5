"""The avatar benchmark: photos of people of one split, and prompts with known truth."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from data_builder.avatars.captions import build_prompt
from data_builder.avatars.edits import (
    CONTINUOUS_PREFIX,
    EDIT_KINDS,
    HELD_OUT_COMBINATIONS,
    HELD_OUT_KINDS,
    HELD_OUT_VALUE,
    AttributeEdit,
    AvatarPair,
    compose_instruction,
    make_pair,
    sample_edit,
)
from data_builder.avatars.identity import (
    SPLITS,
    Scene,
    list_hidden_attributes,
    sample_identity,
    sample_scene,
)
from data_builder.avatars.rendering import render_portrait
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
_TRUTH_ATTRIBUTES: Final = (
    "expression",
    "eyes",
    "glasses",
    "garment",
    "garment_color",
    "background",
)


def write_benchmark(
    output_dir: Path, split: str = "test", num_subjects: int = 64, photos_per_subject: int = 8
) -> None:
    """``output_dir/subjects/NAME/K.png`` and ``output_dir/prompts.json`` as ``main_callback.evaluation.write_benchmark`` reads them."""
    for seed in SPLITS[split][:num_subjects]:
        folder = output_dir / "subjects" / f"person-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(photos_per_subject):
            plain_scene = replace(sample_scene(seed, k), hat="none", style="plain")
            render_portrait(sample_identity(seed), plain_scene).save(
                folder / f"{k}.webp", lossless=True, method=6
            )
    prompts = [{"prompt": build_prompt(s), "truth": _build_scene_truth(s)} for s in SCENES]
    (output_dir / "prompts.json").write_text(json.dumps(prompts, indent=1))


def _build_scene_truth(asked: Scene) -> dict[str, str]:
    """What the evaluator should read: of what was asked, all that can be seen."""
    unseen = list_hidden_attributes(asked)
    return {name: str(getattr(asked, name)) for name in _TRUTH_ATTRIBUTES if name not in unseen}


SEEN_KINDS_GROUP: Final = "seen kinds"
HELD_OUT_COMBINATIONS_GROUP: Final = "unseen combinations"
HELD_OUT_KINDS_GROUP: Final = "unseen kinds"
HELD_OUT_VALUE_GROUP: Final = "unseen by the edit base too"


def write_edit_benchmark(
    output_dir: Path,
    split: str = "test",
    edits_per_kind: int = 3,
    num_test_pairs: int = 3,
    num_example_pairs: int = 2,
) -> None:
    """``output_dir`` as ``main_callback.evaluation.write_edit_benchmark`` reads it: ``edits_per_kind`` edits of every kind (and of every unseen
    combination, and of the unseen value), each shown on ``num_example_pairs`` people and asked for on ``num_test_pairs`` more."""
    records = []
    for index, (group, name, edits) in enumerate(_sample_benchmark_edits(edits_per_kind)):
        seeds = SPLITS[split][
            index * (num_test_pairs + num_example_pairs) : (index + 1)
            * (num_test_pairs + num_example_pairs)
        ]
        pairs = [make_pair((sample_identity(seed), sample_scene(seed, 0)), edits) for seed in seeds]
        folder = output_dir / f"{index:03d}-{name.replace(' ', '-')}"
        folder.mkdir(parents=True, exist_ok=True)
        for i, edit_pair in enumerate(pairs):
            stem = f"shown-{i}" if i < num_example_pairs else f"other-{i - num_example_pairs}"
            for side, portrait in (("before", edit_pair.before), ("after", edit_pair.after)):
                render_portrait(*portrait).save(
                    folder / f"{stem}_{side}.webp", lossless=True, method=6
                )
        records.append(
            {
                "name": folder.name,
                "kind": name,
                "group": group,
                "instruction": pairs[0].instruction,
                "truth": _build_edit_truth(pairs[0]),
            }
            | _build_blend(edits)
        )
    (output_dir / "edits.json").write_text(json.dumps(records, indent=1))


def _sample_benchmark_edits(
    edits_per_kind: int,
) -> Iterator[tuple[str, str, tuple[AttributeEdit, ...]]]:
    """(group, kind, changes), the first of every kind before the second of any."""
    for round_ in range(edits_per_kind):
        rng = np.random.default_rng([20261124, round_])
        for kind in EDIT_KINDS:
            yield (
                (HELD_OUT_KINDS_GROUP if kind in HELD_OUT_KINDS else SEEN_KINDS_GROUP),
                kind,
                (sample_edit(rng, kind),),
            )
        for kinds in HELD_OUT_COMBINATIONS:
            first_kind, second_kind = sorted(kinds)
            yield (
                HELD_OUT_COMBINATIONS_GROUP,
                f"{first_kind} + {second_kind}",
                (sample_edit(rng, first_kind), sample_edit(rng, second_kind)),
            )
        attribute, value = HELD_OUT_VALUE
        yield HELD_OUT_VALUE_GROUP, value, (AttributeEdit(attribute, "plain", value),)


def _build_blend(edits: tuple[AttributeEdit, ...]) -> dict[str, str]:
    """The words for what no single word names, if there is any."""
    blend = compose_instruction([(c.attribute, c.after) for c in edits])
    return {"blend": blend} if any(c.kind.startswith(CONTINUOUS_PREFIX) for c in edits) else {}


def _build_edit_truth(drawn: AvatarPair) -> dict[str, str]:
    """What the evaluator should read in the answers: of what changes, all that has a name and can be seen."""
    known = IDENTITY_ATTRIBUTES | PROMPT_ATTRIBUTES
    unseen = list_hidden_attributes(drawn.after[1])
    return {
        c.attribute: c.after
        for c in drawn.edits
        if c.attribute in known
        and c.attribute not in unseen
        and not c.kind.startswith(CONTINUOUS_PREFIX)
    }
