"""Repositories on the Hugging Face hub and on ModelScope; an interrupted fetch resumes."""

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Final

import huggingface_hub.constants
from huggingface_hub import HfApi, get_session, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers

from hyperlora.errors import ModelLoadError, format_reason
from hyperlora.pipelines.released.http_ranges import RangeSource, fetch_file, read_http_range
from hyperlora.pipelines.released.repository_files import (
    ReleasedFiles,
    get_cache_dir,
    make_part_path,
)

MODELSCOPE_ENV: Final = "MODELSCOPE_DOMAIN"
"""Environment variable of ModelScope's own library: its domain, or an address."""
_MODELSCOPE_DOMAIN: Final = "www.modelscope.cn"


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
        target = make_part_path(self.name, self.revision, path, prefix)
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


def _run_hub_call(name: str, call: Callable[[], Path]) -> Path:
    """Run a call of the hub's library; its errors become one sentence."""
    try:
        return call()
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        raise ModelLoadError(
            f"{name!r} could not be fetched ({format_reason(error, 100)}): run the same command "
            "again, it goes on where it stopped"
        ) from error
