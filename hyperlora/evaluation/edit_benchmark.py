"""Edit benchmarks on disk: example pairs of each edit, and test pairs of input and target.

edits.json                              list of {"name", "kind", "group", "instruction",
                                        "truth": {attribute: class}, "blend"}
NAME/shown-K_before.*  shown-K_after.*  example pairs; the first is used unless stated otherwise
NAME/other-K_before.*  other-K_after.*  test pairs: image to edit, and exact result

The kind of a double edit is "one + other". The blend is a prompt blend for an edit without a name.

Any folder of ``NAME_before.png`` and ``NAME_after.png`` is a benchmark too. Every pair is then an
edit of its own, tested on its own image, without attributes and groups.
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
    """One edit of a benchmark.

    Attributes:
        name: Name of the edit.
        example_pairs: Images before and after [pairs, 2, 3, size, size] in [0, 1].
        test_pairs: Inputs and targets [images, 2, 3, size, size] in [0, 1].
        kind: Kind of the edit; of a double edit "one + other".
        group: Group in the report.
        instruction: Edit prompt; empty if there is none.
        blend: Prompt blend for an edit that no single prompt names; empty if not needed.
        truth: Class of each edited attribute in the targets.
    """

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
        """Whether ``truth`` names all edited attributes, of "garment + tone" both."""
        return len(self.truth) > self.kind.count(" + ")


@dataclass(frozen=True)
class EditBenchmark:
    """Edits of a benchmark.

    Attributes:
        edits: The edits in order.
    """

    edits: tuple[Edit, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups in order of appearance."""
        return tuple(dict.fromkeys(edit.group for edit in self.edits))


def load_edit_benchmark(
    folder: str | os.PathLike[str], image_size: int, max_edits_per_group: int | None = None
) -> EditBenchmark:
    """Load an edit benchmark, or any folder of pairs.

    Args:
        folder: Folder of ``edits.json``, or of pairs.
        image_size: Side of the images in pixels.
        max_edits_per_group: Edits of each group, the first ones; None: all.

    Returns:
        The benchmark.

    Raises:
        InvalidArgumentError: If ``edits.json`` is malformed or an edit lacks pairs.
        InvalidImageError: If the folder holds no pair.
    """
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
            entry
            for i, entry in enumerate(entries)
            if max_edits_per_group is None
            or _count_earlier_in_group(entries, i) < max_edits_per_group
        ]
        edits = [_load_edit(folder / str(entry["name"]), entry, image_size) for entry in selected]
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidArgumentError(
            f'{str(path)!r} is no list of {{"name": ..., "kind": ...}}: draw it again'
        ) from error
    if not edits:
        raise InvalidArgumentError(f"{str(path)!r} lists no edit: draw the benchmark again")
    return EditBenchmark(tuple(edits))


def _count_earlier_in_group(entries: list[dict[str, object]], index: int) -> int:
    """Count the earlier entries of the same group."""
    group = entries[index].get("group")
    return sum(entry.get("group") == group for entry in entries[:index])


def _load_edit(folder: Path, entry: Mapping[str, object], image_size: int) -> Edit:
    """Load the pairs of an entry of ``edits.json``."""
    pairs = list_named_pairs(folder)
    example_pairs, test_pairs = (
        [pair for pair in pairs if pair.name.startswith(prefix)] for prefix in ("shown-", "other-")
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
        {str(name): str(value) for name, value in truth.items()},
    )


def _stack_pairs(pairs: Sequence[ImagePair], image_size: int) -> Tensor:
    """Stack pairs to a tensor [pairs, 2, 3, size, size]."""
    return torch.stack(
        [
            torch.stack(
                [to_tensor(read_image(side), image_size) for side in (pair.before, pair.after)]
            )
            for pair in pairs
        ]
    )
