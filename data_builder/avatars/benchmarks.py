"""Benchmarks of the avatar world: photos of unseen identities with prompts, and edits with their
exact results.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from data_builder.avatars.captions import build_prompt
from data_builder.avatars.edits import AttributeEdit, AvatarPair, make_pair, sample_edit
from data_builder.avatars.identity import (
    SPLITS,
    Scene,
    list_hidden_attributes,
    sample_identity,
    sample_scene,
)
from data_builder.avatars.instructions import (
    CONTINUOUS_PREFIX,
    EDIT_KINDS,
    HELD_OUT_COMBINATIONS,
    HELD_OUT_KINDS,
    HELD_OUT_VALUE,
    compose_instruction,
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
"""Scenes that the benchmark prompts describe."""
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
    """Write a subject benchmark for ``hyperlora.evaluation.benchmark.load_benchmark``.

    Args:
        output_dir: Folder to write ``subjects/NAME/K.webp`` and ``prompts.json`` into.
        split: Split of the identities.
        num_subjects: Number of identities, the first of the split.
        photos_per_subject: Portraits of each identity.
    """
    for seed in SPLITS[split][:num_subjects]:
        folder = output_dir / "subjects" / f"person-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(photos_per_subject):
            plain_scene = replace(sample_scene(seed, k), hat="none", style="plain")
            render_portrait(sample_identity(seed), plain_scene).save(
                folder / f"{k}.webp", lossless=True, method=6
            )
    prompts = [
        {"prompt": build_prompt(scene), "truth": _build_scene_truth(scene)} for scene in SCENES
    ]
    (output_dir / "prompts.json").write_text(json.dumps(prompts, indent=1))


def _build_scene_truth(scene: Scene) -> dict[str, str]:
    """Attributes that the evaluator should recognize: all visible ones that the prompt names."""
    hidden = list_hidden_attributes(scene)
    return {name: str(getattr(scene, name)) for name in _TRUTH_ATTRIBUTES if name not in hidden}


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
    """Write an edit benchmark for ``hyperlora.evaluation.edit_benchmark.load_edit_benchmark``.

    Each kind of edit, each held-out combination and the held-out value appear ``edits_per_kind``
    times.

    Args:
        output_dir: Folder to write one folder per edit and ``edits.json`` into.
        split: Split of the identities.
        edits_per_kind: Edits of each kind.
        num_test_pairs: Identities that each edit is evaluated on.
        num_example_pairs: Further identities that show each edit.
    """
    records = []
    for index, (group, name, edits) in enumerate(_sample_benchmark_edits(edits_per_kind)):
        num_pairs = num_test_pairs + num_example_pairs
        seeds = SPLITS[split][index * num_pairs : (index + 1) * num_pairs]
        pairs = [make_pair((sample_identity(seed), sample_scene(seed, 0)), edits) for seed in seeds]
        folder = output_dir / f"{index:03d}-{name.replace(' ', '-')}"
        folder.mkdir(parents=True, exist_ok=True)
        for i, pair in enumerate(pairs):
            stem = f"shown-{i}" if i < num_example_pairs else f"other-{i - num_example_pairs}"
            for side, portrait in (("before", pair.before), ("after", pair.after)):
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
    """Sample (group, kind, edits); the first of every kind comes before the second of any."""
    for repetition in range(edits_per_kind):
        rng = np.random.default_rng([20261124, repetition])
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
    """The prompt blend of an edit that no single prompt names, if it is one."""
    blend = compose_instruction([(edit.attribute, edit.after) for edit in edits])
    return (
        {"blend": blend} if any(edit.kind.startswith(CONTINUOUS_PREFIX) for edit in edits) else {}
    )


def _build_edit_truth(pair: AvatarPair) -> dict[str, str]:
    """Attributes that the evaluator should recognize: all edited, visible ones with a name."""
    known = IDENTITY_ATTRIBUTES | PROMPT_ATTRIBUTES
    _, scene_after = pair.after
    hidden = list_hidden_attributes(scene_after)
    return {
        edit.attribute: edit.after
        for edit in pair.edits
        if edit.attribute in known
        and edit.attribute not in hidden
        and not edit.kind.startswith(CONTINUOUS_PREFIX)
    }
