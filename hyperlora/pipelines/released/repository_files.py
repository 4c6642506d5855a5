"""``ReleasedFiles``: the files of a repository that others released, in a folder or elsewhere."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Final

import huggingface_hub.constants

from hyperlora.errors import ModelLoadError
from hyperlora.pipelines.released.tensor_headers import TensorHeader, parse_header

_HEADER_BYTES: Final = 100_000
"""Bytes of a first read, in which most headers end."""


class ReleasedFiles(ABC):
    """The files of one repository.

    Args:
        name: The folder or the id, as the user wrote it, without the variant.
        variant: What stands behind the colon; empty for nothing.
    """

    def __init__(self, name: str, variant: str = "") -> None:
        self.name, self.variant = name, variant
        self._headers: dict[str, TensorHeader] = {}

    @property
    @abstractmethod
    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file by its path in the repository, with ``/`` between folders."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """Where the files are, and in which revision, for people."""

    @abstractmethod
    def read_range(self, path: str, begin: int, end: int) -> bytes:
        """Read a part of a file.

        Args:
            path: The path in the repository.
            begin: The first byte.
            end: The byte behind the last; cut at the end of the file.

        Returns:
            The bytes.

        Raises:
            ModelLoadError: The file cannot be read.
        """

    @abstractmethod
    def fetch(self, path: str) -> Path:
        """Fetch a file, unless it is here already.

        Args:
            path: The path in the repository.

        Returns:
            The file on this machine.

        Raises:
            ModelLoadError: The repository lacks the file, or it cannot be fetched.
        """

    def read_header(self, path: str) -> TensorHeader:
        """Read names, types and shapes of the tensors of a safetensors file, and nothing else.

        Args:
            path: The path in the repository.

        Returns:
            The header.

        Raises:
            ModelLoadError: The file is missing, cut off or no safetensors file.
        """
        if path in self._headers:
            return self._headers[path]
        self.check_file(path)
        start = self.read_range(path, 0, _HEADER_BYTES)
        header_end = 8 + int.from_bytes(start[:8], "little")
        if len(start) < header_end <= self.sizes[path]:
            start += self.read_range(path, len(start), header_end)
        header = parse_header(start, self.sizes[path], f"{self.name}/{path}")
        self._headers[path] = header
        return header

    def fetch_tensors(self, path: str, prefix: str) -> Path:
        """Fetch those tensors of a safetensors file whose names begin with a prefix.

        Args:
            path: The path in the repository.
            prefix: The beginning of the names, e.g. ``vision_model.``.

        Returns:
            A file with these tensors; with all of them where the whole file is here already.

        Raises:
            ModelLoadError: As ``fetch``, or the file has no such tensor.
        """
        return self.fetch(path)

    def check_file(self, path: str) -> None:
        """Check that the repository has a file.

        Raises:
            ModelLoadError: It does not.
        """
        if path not in self.sizes:
            raise ModelLoadError(
                f"{self.name!r} lacks {path}: fetch it again, the whole folder is needed"
            )


class FolderFiles(ReleasedFiles):
    """The files of a folder on this machine.

    Args:
        folder: The folder.
        variant: What stands behind the colon; empty for nothing.
        name: What messages call it; the folder itself if empty.
    """

    def __init__(self, folder: Path, variant: str = "", name: str = "") -> None:
        super().__init__(name or str(folder), variant)
        self.folder = folder

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file by its path in the folder."""
        return {
            path.relative_to(self.folder).as_posix(): path.stat().st_size
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }

    @property
    def origin(self) -> str:
        """The folder."""
        return str(self.folder)

    def read_range(self, path: str, begin: int, end: int) -> bytes:
        """Read a part of a file of the folder.

        Args:
            path: The path in the folder.
            begin: The first byte.
            end: The byte behind the last.

        Returns:
            The bytes.
        """
        with (self.folder / path).open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    def fetch(self, path: str) -> Path:
        """Return the path of a file of the folder."""
        self.check_file(path)
        return self.folder / path


class CachedFiles(FolderFiles):
    """What the cache of the hub holds of a repository.

    Args:
        folder: The snapshot of one commit.
        variant: What stands behind the colon; empty for nothing.
        repo_id: ``ORG/NAME``.
    """

    def fetch_tensors(self, path: str, prefix: str) -> Path:
        """Return the file of some tensors, or that of all.

        Args:
            path: The path in the repository.
            prefix: The beginning of the tensors' names.

        Returns:
            The file.

        Raises:
            ModelLoadError: Neither was fetched.
        """
        part_path = make_part_path(self.name, self.folder.name, path, prefix)
        return part_path if part_path.is_file() else self.fetch(path)


def get_cache_dir() -> Path:
    """Return the folder of what is fetched outside of the hub's own cache."""
    return Path(huggingface_hub.constants.HF_HOME) / "hyperlora"


def make_part_path(repo_id: str, revision: str, path: str, prefix: str) -> Path:
    """Make the path of a file of those tensors whose names begin with a prefix.

    Args:
        repo_id: ``ORG/NAME``.
        revision: The commit.
        path: The whole file's path in the repository.
        prefix: The beginning of the names.

    Returns:
        The path in the cache of hyperlora.
    """
    name = f"{PurePosixPath(path).stem}-{prefix.strip('.')}.safetensors"
    return get_cache_dir() / "hub" / repo_id / revision / name
