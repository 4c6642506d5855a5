"""``open_files``: a released network by its name: a folder, the hub, ModelScope or the cache.

Sizes and headers are read before anything large is fetched.
"""

import json
from pathlib import Path

import huggingface_hub.constants
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from hyperlora.errors import InvalidArgumentError, ModelLoadError, format_reason
from hyperlora.hub_connection import is_repo_id, require_cache_if_offline
from hyperlora.pipelines.released.remote_files import HubFiles, ModelScopeFiles
from hyperlora.pipelines.released.repository_files import (
    CachedFiles,
    FolderFiles,
    ReleasedFiles,
    get_cache_dir,
)


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
    cache_dir = Path(huggingface_hub.constants.HF_HUB_CACHE)
    repo_dir = cache_dir / f"models--{repo_id.replace('/', '--')}"
    ref_path = repo_dir / "refs" / (revision or "main")
    commit = ref_path.read_text().strip() if ref_path.is_file() else revision or ""
    snapshots = [
        path for path in repo_dir.glob("snapshots/*") if path.name == (commit or path.name)
    ]
    if snapshots:
        newest = max(snapshots, key=lambda path: path.stat().st_mtime)
        return CachedFiles(newest, variant, repo_id)
    folder_path = get_cache_dir() / "modelscope" / repo_id / (revision or "master")
    return FolderFiles(folder_path, variant, repo_id) if folder_path.is_dir() else None


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
