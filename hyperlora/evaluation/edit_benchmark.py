"""A benchmark of edits on disk: for each edit a pair that shows it, and other pictures with the drawn answer.

edits.json                             [{"name", "kind", "group", "instruction", "truth": {attribute: class},
                                         "blend": words for what none names, as ``main_callback.prompt_blending``}, ...]
                                        of two changes at once, "kind" is "one + other"
NAME/shown-K_before.*  shown-K_after.*    pairs that show the edit (the first is used unless told otherwise)
NAME/other-K_before.*  other-K_after.*    pictures to edit, and the exact answers

Any folder of ``NAME_before.png`` and ``NAME_after.png`` is one too: every pair is then its own edit, made again on its
own picture; attributes and groups are left out.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hyperlora.data.edit_pairs import ImagePair, list_named_pairs
from hyperlora.data.images import read_image, to_tensor
from hyperlora.errors import InvalidArgumentError


@dataclass(frozen=True)
class Edit:
    """``example_pairs`` [pairs, 2, 3, size, size] and ``test_pairs`` [pictures, 2, 3, size, size], of each before and after;
    ``truth`` is what an evaluator should read in the answers."""

    name: str
    example_pairs: Tensor
    test_pairs: Tensor
    kind: str = ""
    group: str = ""
    instruction: str = ""
    blend: str = ""
    truth: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_complete_truth(self) -> bool:
        """Whether ``truth`` names all that changes: of a ``kind`` of two, "garment + tone", both."""
        return len(self.truth) > self.kind.count(" + ")


@dataclass(frozen=True)
class EditBenchmark:
    edits: tuple[Edit, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """In order of appearance."""
        return tuple(dict.fromkeys(edit.group for edit in self.edits))


def load_edit_benchmark(
    folder: str | os.PathLike[str], image_size: int, max_edits_per_group: int | None = None
) -> EditBenchmark:
    """Read a benchmark; ``max_edits_per_group`` takes the first so many edits of every group. Raises ``InvalidArgumentError`` for an
    ``edits.json`` that is none, ``InvalidImageError`` if there is no pair."""
    folder = Path(folder)
    path = folder / "edits.json"
    if not path.is_file():
        pairs = [(pair.name, _stack_pairs([pair], image_size)) for pair in list_named_pairs(folder)]
        return EditBenchmark(
            tuple(Edit(name, pixels, pixels) for name, pixels in pairs[:max_edits_per_group])
        )
    try:
        entries = [dict(item) for item in json.loads(path.read_text())]
        selected = [
            f
            for i, f in enumerate(entries)
            if max_edits_per_group is None
            or _count_earlier_in_group(entries, i) < max_edits_per_group
        ]
        edits = [_load_edit(folder / str(f["name"]), f, image_size) for f in selected]
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidArgumentError(
            f'{str(path)!r} is no list of {{"name": ..., "kind": ...}}: draw it again'
        ) from error
    if not edits:
        raise InvalidArgumentError(f"{str(path)!r} lists no edit: draw the benchmark again")
    return EditBenchmark(tuple(edits))


def _count_earlier_in_group(entries: list[dict[str, object]], index: int) -> int:
    return sum(f.get("group") == entries[index].get("group") for f in entries[:index])


def _load_edit(folder: Path, entry: Mapping[str, object], image_size: int) -> Edit:
    pairs = list_named_pairs(folder)
    example_pairs, test_pairs = (
        [p for p in pairs if p.name.startswith(kind)] for kind in ("shown-", "other-")
    )
    truth = entry.get("truth") or {}
    if not example_pairs or not test_pairs or not isinstance(truth, Mapping):
        raise InvalidArgumentError(
            f"{str(folder)!r} lacks shown-0_before/_after or other-0_before/_after: draw it again"
        )
    return Edit(
        folder.name,
        _stack_pairs(example_pairs, image_size),
        _stack_pairs(test_pairs, image_size),
        str(entry["kind"]),
        str(entry["group"]),
        str(entry["instruction"]),
        str(entry.get("blend", "")),
        {str(k): str(v) for k, v in truth.items()},
    )


def _stack_pairs(pairs: Sequence[ImagePair], image_size: int) -> Tensor:
    return torch.stack(
        [
            torch.stack([to_tensor(read_image(s), image_size) for s in (p.before, p.after)])
            for p in pairs
        ]
    )
