"""A benchmark of edits on disk: for each edit a pair that shows it, and other pictures with the drawn answer.

edits.json                             [{"name", "kind", "group", "instruction", "truth": {attribute: class},
                                         "blend": words for what none names, as ``hyperlora.prompt_blending``}, ...]
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

from hyperlora.data.edit_pairs import ImagePair, named_pairs
from hyperlora.data.images import read_image, to_tensor
from hyperlora.errors import BadRequest


@dataclass(frozen=True)
class Edit:
    """``shown`` [pairs, 2, 3, size, size] and ``others`` [pictures, 2, 3, size, size], of each before and after;
    ``truth`` is what an evaluator should read in the answers."""

    name: str
    shown: Tensor
    others: Tensor
    kind: str = ""
    group: str = ""
    instruction: str = ""
    blend: str = ""
    truth: Mapping[str, str] = field(default_factory=dict)

    @property
    def all_named(self) -> bool:
        """Whether ``truth`` names all that changes: of a ``kind`` of two, "garment + tone", both."""
        return len(self.truth) > self.kind.count(" + ")


@dataclass(frozen=True)
class EditBenchmark:
    edits: tuple[Edit, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """In order of appearance."""
        return tuple(dict.fromkeys(edit.group for edit in self.edits))


def load_edit_benchmark(folder: str | os.PathLike[str], size: int, limit: int | None = None) -> EditBenchmark:
    """Read a benchmark; ``limit`` takes the first so many edits of every group. Raises ``BadRequest`` for an
    ``edits.json`` that is none, ``BadImage`` if there is no pair."""
    folder = Path(folder)
    file = folder / "edits.json"
    if not file.is_file():
        pairs = [(pair.name, _tensor([pair], size)) for pair in named_pairs(folder)]
        return EditBenchmark(tuple(Edit(name, pixels, pixels) for name, pixels in pairs[:limit]))
    try:
        facts = [dict(item) for item in json.loads(file.read_text())]
        chosen = [f for i, f in enumerate(facts) if limit is None or _rank(facts, i) < limit]
        edits = [_edit(folder / str(f["name"]), f, size) for f in chosen]
    except (ValueError, TypeError, KeyError) as error:
        raise BadRequest(f'{str(file)!r} is no list of {{"name": ..., "kind": ...}}: draw it again') from error
    if not edits:
        raise BadRequest(f"{str(file)!r} lists no edit: draw the benchmark again")
    return EditBenchmark(tuple(edits))


def _rank(facts: list[dict[str, object]], index: int) -> int:
    return sum(f.get("group") == facts[index].get("group") for f in facts[:index])


def _edit(folder: Path, facts: Mapping[str, object], size: int) -> Edit:
    pairs = named_pairs(folder)
    shown, others = ([p for p in pairs if p.name.startswith(kind)] for kind in ("shown-", "other-"))
    truth = facts.get("truth") or {}
    if not shown or not others or not isinstance(truth, Mapping):
        raise BadRequest(f"{str(folder)!r} lacks shown-0_before/_after or other-0_before/_after: draw it again")
    return Edit(
        folder.name, _tensor(shown, size), _tensor(others, size), str(facts["kind"]), str(facts["group"]),
        str(facts["instruction"]), str(facts.get("blend", "")), {str(k): str(v) for k, v in truth.items()},
    )  # fmt: skip


def _tensor(pairs: Sequence[ImagePair], size: int) -> Tensor:
    return torch.stack([torch.stack([to_tensor(read_image(s), size) for s in (p.before, p.after)]) for p in pairs])
