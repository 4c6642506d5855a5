"""``inspect_repository``: what a released network is, from headers alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hyperlora.errors import ModelLoadError
from hyperlora.pipelines.released.cards import ReleasedCard, find_card
from hyperlora.pipelines.released.hub_files import FolderFiles, ReleasedFiles, open_files
from hyperlora.pipelines.released.recognize import recognize, recognize_header
from hyperlora.pipelines.released.tensor_headers import TensorHeader, read_file_header

HUB_PREFIX = "hub:"
"""Before the id of a repository, where a file could be meant too."""


@dataclass(frozen=True)
class RepositoryInfo:
    """Summary of a repository, a folder or one safetensors file.

    Attributes:
        name: The id, the folder or the file.
        origin: Where the files are, and in which revision.
        kind: How the network is built; ``unknown`` for anything else.
        variants: Its variants; empty for a network without any.
        sizes: Bytes of every file by its path.
        headers: The tensors of every safetensors file by its path.
        cards: What is known of the variants, with licenses.
    """

    name: str
    origin: str
    kind: str
    variants: tuple[str, ...]
    sizes: Mapping[str, int]
    headers: Mapping[str, TensorHeader]
    cards: Sequence[ReleasedCard]

    def to_dict(self) -> dict[str, object]:
        """Convert to a dictionary for JSON."""
        return {
            "name": self.name,
            "origin": self.origin,
            "kind": self.kind,
            "variants": list(self.variants),
            "sizes": dict(self.sizes),
            "licenses": sorted({part.license for card in self.cards for part in card.parts}),
            "commercial_use": self.cards[0].is_commercial if self.cards else None,
            "files": {
                path: {
                    "digest": header.digest,
                    "num_parameters": header.numel,
                    "metadata": dict(header.metadata),
                    "tensors": {
                        name: [entry.dtype, list(entry.shape)]
                        for name, entry in header.tensors.items()
                    },
                }
                for path, header in self.headers.items()
            },
        }


def inspect_repository(
    name: str, revision: str | None = None, offline: bool = False
) -> RepositoryInfo:
    """Summarize a repository or a folder; only headers are fetched.

    Args:
        name: ``hub:ORG/NAME``, ``ORG/NAME`` or a folder, perhaps with ``:VARIANT``.
        revision: Branch, tag or commit; None for the main branch.
        offline: Whether only the cache is used.

    Returns:
        The summary; with a variant, of its files only.

    Raises:
        ModelLoadError: There is no such repository, or one of its files is damaged.
    """
    files = open_files(name.removeprefix(HUB_PREFIX), revision, offline)
    try:
        recognition = recognize(files)
    except ModelLoadError:
        if files.variant:
            raise
        return _summarize(files, "unknown", (), tuple(files.sizes), ())
    paths = recognition.files if files.variant else tuple(files.sizes)
    names = (recognition.variant,) if files.variant else recognition.variants
    cards = [card for variant in names if (card := _find_card(recognition.kind, variant))]
    return _summarize(files, recognition.kind, recognition.variants, paths, cards)


def inspect_network_file(path: Path) -> RepositoryInfo | None:
    """Summarize one safetensors file of a released network.

    Args:
        path: The file.

    Returns:
        The summary; None for a file of anything else, e.g. a LoRA.

    Raises:
        ModelLoadError: The file is missing or damaged.
    """
    header = read_file_header(path)
    kind = recognize_header(header)
    if kind is None:
        return None
    files = FolderFiles(path.parent)
    card = _find_card(kind, "")
    return RepositoryInfo(
        str(path),
        files.origin,
        kind,
        (),
        {path.name: path.stat().st_size},
        {path.name: header},
        [card] if card else [],
    )


def _summarize(
    files: ReleasedFiles,
    kind: str,
    variants: tuple[str, ...],
    paths: Sequence[str],
    cards: Sequence[ReleasedCard],
) -> RepositoryInfo:
    headers = {path: files.read_header(path) for path in paths if path.endswith(".safetensors")}
    sizes = {path: files.sizes[path] for path in paths}
    return RepositoryInfo(files.name, files.origin, kind, variants, sizes, headers, cards)


def _find_card(kind: str, variant: str) -> ReleasedCard | None:
    try:
        return find_card(kind, variant)  # type: ignore[arg-type]
    except ModelLoadError:
        return _find_card(kind, "") if variant else None
