"""Files of a repository that others released: in a folder, on the hub or on ModelScope.

Sizes and headers are read before anything large is fetched; an interrupted fetch resumes.
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Final

import huggingface_hub
import huggingface_hub.constants
from huggingface_hub import (
    HfApi,
    get_session,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers

from hyperlora.errors import InvalidArgumentError, ModelLoadError, format_reason
from hyperlora.hub_connection import is_repo_id, require_cache_if_offline
from hyperlora.pipelines.released.http_ranges import RangeSource, fetch_file, read_http_range
from hyperlora.pipelines.released.tensor_headers import TensorHeader, parse_header

MODELSCOPE_ENV: Final = "MODELSCOPE_DOMAIN"
"""Environment variable of ModelScope's own library: its domain, or an address."""
_MODELSCOPE_DOMAIN: Final = "www.modelscope.cn"
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
        self.check_file(path)
        start = self.read_range(path, 0, _HEADER_BYTES)
        header_end = 8 + int.from_bytes(start[:8], "little")
        if len(start) < header_end <= self.sizes[path]:
            start += self.read_range(path, len(start), header_end)
        return parse_header(start, self.sizes[path], f"{self.name}/{path}")

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


class HubFiles(ReleasedFiles):
    """The files of a repository on the Hugging Face hub.

    Args:
        repo_id: ``ORG/NAME``.
        variant: What stands behind the colon; empty for nothing.
        revision: Branch, tag or commit; None for the main branch.
    """

    def __init__(self, repo_id: str, variant: str = "", revision: str | None = None) -> None:
        super().__init__(repo_id, variant)
        self.requested_revision = revision
        info = HfApi(endpoint=huggingface_hub.constants.ENDPOINT).model_info(
            repo_id, revision=revision
        )
        self.revision = str(info.sha)

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file by its path in the repository."""
        api = HfApi(endpoint=huggingface_hub.constants.ENDPOINT)
        entries = api.list_repo_tree(self.name, recursive=True, revision=self.revision)
        return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}

    @property
    def origin(self) -> str:
        """The id and the commit."""
        return f"{self.name} on the hub, commit {self.revision}"

    def read_range(self, path: str, begin: int, end: int) -> bytes:
        """Read a part of a file by an HTTP range request.

        Args:
            path: The path in the repository.
            begin: The first byte.
            end: The byte behind the last.

        Returns:
            The bytes.

        Raises:
            ModelLoadError: The hub does not answer, or does not serve ranges.
        """
        url = hf_hub_url(
            self.name,
            path,
            revision=self.revision,
            endpoint=huggingface_hub.constants.ENDPOINT,
        )
        return read_http_range(url, begin, min(end, self.sizes[path]), build_hf_headers())

    def fetch(self, path: str) -> Path:
        """Fetch a file into the cache of the hub; an interrupted fetch resumes."""
        self.check_file(path)
        return _run_hub_call(
            self.name,
            lambda: Path(
                hf_hub_download(
                    self.name,
                    path,
                    revision=self.revision,
                    endpoint=huggingface_hub.constants.ENDPOINT,
                )
            ),
        )

    def fetch_tensors(self, path: str, prefix: str) -> Path:
        """Fetch some tensors by HTTP ranges, unless the cache has the whole file.

        Args:
            path: The path in the repository.
            prefix: The beginning of their names.

        Returns:
            The file.

        Raises:
            ModelLoadError: The hub does not answer, or the file has no such tensor.
        """
        header = self.read_header(path)
        part, ranges, num_bytes = header.make_part(prefix)
        if not ranges:
            raise ModelLoadError(f"{self.name}/{path} has no tensor {prefix}*: give another one")
        whole_file = try_to_load_from_cache(self.name, path, revision=self.revision)
        if isinstance(whole_file, str):
            return Path(whole_file)
        url = hf_hub_url(
            self.name, path, revision=self.revision, endpoint=huggingface_hub.constants.ENDPOINT
        )
        name = f"{PurePosixPath(path).stem}-{prefix.strip('.')}.safetensors"
        target = get_cache_dir() / "hub" / self.name / self.revision / name
        return fetch_file(RangeSource(url, num_bytes, part, ranges, build_hf_headers()), target)


class ModelScopeFiles(ReleasedFiles):
    """The files of a repository on ModelScope.

    Args:
        repo_id: ``ORG/NAME``.
        variant: What stands behind the colon; empty for nothing.
        revision: Branch, tag or commit; None for the main branch.

    Raises:
        ModelLoadError: ModelScope does not know the repository, or does not answer.
    """

    def __init__(self, repo_id: str, variant: str = "", revision: str | None = None) -> None:
        super().__init__(repo_id, variant)
        self.revision = revision or "master"
        domain = os.environ.get(MODELSCOPE_ENV) or _MODELSCOPE_DOMAIN
        self.endpoint = domain if "://" in domain else f"https://{domain}"
        url = f"{self.endpoint}/api/v1/models/{repo_id}/repo/files"
        query = {"Revision": self.revision, "Recursive": "true"}
        try:
            response = get_session().get(url, params=query, timeout=10.0, follow_redirects=True)
            response.raise_for_status()
            files = response.json()["Data"]["Files"]
            self._sizes = {str(f["Path"]): int(f["Size"]) for f in files if f["Type"] == "blob"}
        except (HTTPError, OSError, ValueError, KeyError, TypeError) as error:
            raise ModelLoadError(
                f"ModelScope has no repository {repo_id!r} ({format_reason(error, 80)}): "
                "check its name"
            ) from error

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file by its path in the repository."""
        return self._sizes

    @property
    def origin(self) -> str:
        """The id and the revision."""
        return f"{self.name} on ModelScope, revision {self.revision}"

    def read_range(self, path: str, begin: int, end: int) -> bytes:
        """Read a part of a file by an HTTP range request.

        Args:
            path: The path in the repository.
            begin: The first byte.
            end: The byte behind the last.

        Returns:
            The bytes.
        """
        return read_http_range(self._make_url(path), begin, min(end, self.sizes[path]), {})

    def fetch(self, path: str) -> Path:
        """Fetch a file into the cache of hyperlora; an interrupted fetch resumes."""
        self.check_file(path)
        target = get_cache_dir() / "modelscope" / self.name / self.revision / path
        return fetch_file(RangeSource(self._make_url(path), self.sizes[path]), target)

    def _make_url(self, path: str) -> str:
        return f"{self.endpoint}/models/{self.name}/resolve/{self.revision}/{path}"


def get_cache_dir() -> Path:
    """Return the folder of what is fetched outside of the hub's own cache."""
    return Path(huggingface_hub.constants.HF_HOME) / "hyperlora"


def split_variant(name: str) -> tuple[str, str]:
    """Split ``ORG/NAME:VARIANT`` or ``FOLDER:VARIANT``; a path that exists has no variant.

    Args:
        name: A folder or a hub id, perhaps with a variant.

    Returns:
        The folder or id, and the variant; empty if there is none.
    """
    head, colon, variant = name.rpartition(":")
    if not colon or Path(name).exists() or not (Path(head).is_dir() or is_repo_id(head)):
        return name, ""
    return head, variant


def open_files(name: str, revision: str | None = None, offline: bool = False) -> ReleasedFiles:
    """Open a folder or a repository for reading.

    Args:
        name: A folder or ``ORG/NAME``, perhaps with ``:VARIANT``.
        revision: Branch, tag or commit of a repository; None for the main branch.
        offline: Whether only the cache is used.

    Returns:
        The files: of the folder, the hub, ModelScope where the hub lacks it, or the cache.

    Raises:
        ModelLoadError: There is no such folder or repository, or nothing can be reached.
        InvalidArgumentError: A folder has no revisions.
    """
    path, variant = split_variant(name)
    if Path(path).is_dir():
        if revision is not None:
            raise InvalidArgumentError(f"{path!r} is a folder and has no revisions: leave it out")
        return FolderFiles(Path(path), variant)
    if not is_repo_id(path) or "/" not in path:
        raise ModelLoadError(
            f"model {path!r} is neither a folder nor a reachable hub id (ORG/NAME): check its name"
        )
    if offline or require_cache_if_offline():
        if (cached := _find_cached_files(path, variant, revision)) is not None:
            return cached
        if offline:
            raise ModelLoadError(
                f"{path!r} is not in the cache of the hub: fetch it once without --offline"
            )
        return _open_modelscope(path, variant, revision, "the hub cannot be reached")
    try:
        return HubFiles(path, variant, revision)
    except RevisionNotFoundError as error:
        raise ModelLoadError(
            f"{path!r} has no revision {revision!r}: give a branch, tag or commit of it"
        ) from error
    except RepositoryNotFoundError:
        return _open_modelscope(path, variant, revision, "the hub has none of this name")
    except (HTTPError, OSError) as error:
        raise ModelLoadError(
            f"{path!r} cannot be read from the hub ({format_reason(error, 100)}): try again, "
            "or give a folder"
        ) from error


def _open_modelscope(
    repo_id: str, variant: str, revision: str | None, reason: str
) -> ModelScopeFiles:
    try:
        return ModelScopeFiles(repo_id, variant, revision)
    except ModelLoadError as error:
        raise ModelLoadError(
            f"model {repo_id!r} is neither a folder nor a reachable hub id ({reason}, and "
            "ModelScope has none): check its name and the connection, or give a folder"
        ) from error


def _find_cached_files(repo_id: str, variant: str, revision: str | None) -> FolderFiles | None:
    """The snapshot in the cache of the hub, or what was fetched from ModelScope."""
    try:
        folder = snapshot_download(repo_id, revision=revision, local_files_only=True)
        return FolderFiles(Path(folder), variant, repo_id)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        pass
    folder_path = get_cache_dir() / "modelscope" / repo_id / (revision or "master")
    return FolderFiles(folder_path, variant, repo_id) if folder_path.is_dir() else None


def _run_hub_call(name: str, call: Callable[[], Path]) -> Path:
    """Run a call of the hub's library; its errors become one sentence."""
    try:
        return call()
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        raise ModelLoadError(
            f"{name!r} could not be fetched ({format_reason(error, 100)}): run the same command "
            "again, it goes on where it stopped"
        ) from error


def read_json(files: ReleasedFiles, path: str) -> dict[str, object]:
    """Read a small JSON file of a repository.

    Args:
        files: The repository.
        path: The path in it.

    Returns:
        The content, in the order of the file.

    Raises:
        ModelLoadError: The file is missing, or holds no JSON object.
    """
    try:
        data = json.loads(files.fetch(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{files.name}/{path} is damaged: fetch it again") from error
    if not isinstance(data, dict):
        raise ModelLoadError(f"{files.name}/{path} holds no JSON object: fetch it again")
    return data
