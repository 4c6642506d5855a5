"""Parts of files by HTTP range requests: headers, some tensors, and fetches that resume."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from huggingface_hub import get_session
from huggingface_hub.errors import HTTPError

from hyperlora.errors import ModelLoadError, format_reason

_TIMEOUT_S: Final = 20.0
_CHUNK_BYTES: Final = 1 << 20
_PARTIAL_CONTENT: Final = 206


@dataclass(frozen=True)
class RangeSource:
    """What to fetch from one address, in order.

    Attributes:
        url: The address of the file.
        num_bytes: The size of the file that is written.
        prefix: Bytes that are written before anything is fetched.
        ranges: First byte and byte behind the last of each part; empty for the whole file.
        headers: Headers of the requests, e.g. with a token.
    """

    url: str
    num_bytes: int
    prefix: bytes = b""
    ranges: Sequence[tuple[int, int]] = ()
    headers: Mapping[str, str] = field(default_factory=dict)


def read_http_range(url: str, begin: int, end: int, headers: Mapping[str, str]) -> bytes:
    """Read a part of a file.

    Args:
        url: The address of the file.
        begin: The first byte.
        end: The byte behind the last.
        headers: Headers of the request.

    Returns:
        The bytes.

    Raises:
        ModelLoadError: The server does not answer, or sends something else.
    """
    return b"".join(_iterate_range(url, begin, end, headers))


def fetch_file(source: RangeSource, path: Path) -> Path:
    """Fetch a file or parts of one; what an interrupted call has written is kept.

    Args:
        source: What to fetch.
        path: The file to write; it appears when it is whole.

    Returns:
        The path.

    Raises:
        ModelLoadError: The server does not answer, or the file ends early.
    """
    if path.is_file() and path.stat().st_size == source.num_bytes:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part_path = path.with_name(f"{path.name}.part")
    if not part_path.is_file() or part_path.stat().st_size < len(source.prefix):
        part_path.write_bytes(source.prefix)
    num_present = part_path.stat().st_size - len(source.prefix)
    with part_path.open("ab") as file:
        for begin, end in source.ranges or [(0, source.num_bytes)]:
            num_skipped = min(num_present, end - begin)
            num_present -= num_skipped
            for chunk in _iterate_range(source.url, begin + num_skipped, end, source.headers):
                file.write(chunk)
    if part_path.stat().st_size != source.num_bytes:
        part_path.unlink()
        raise ModelLoadError(f"{path.name} changed while it was fetched: run the command again")
    part_path.replace(path)
    return path


def _iterate_range(url: str, begin: int, end: int, headers: Mapping[str, str]) -> Iterator[bytes]:
    """Read a part of a file in chunks; never more than that part."""
    if begin >= end:
        return
    range_headers = {**headers, "Range": f"bytes={begin}-{end - 1}"}
    num_missing = end - begin
    try:
        with get_session().stream(
            "GET", url, headers=range_headers, timeout=_TIMEOUT_S, follow_redirects=True
        ) as response:
            response.raise_for_status()
            if response.status_code != _PARTIAL_CONTENT and begin:
                raise ModelLoadError(f"{url} does not serve parts of files: fetch it by hand")
            for chunk in response.iter_bytes(_CHUNK_BYTES):
                yield chunk[:num_missing]
                num_missing -= len(chunk)
                if num_missing <= 0:
                    return
    except (HTTPError, OSError) as error:
        raise ModelLoadError(
            f"{url} could not be read ({format_reason(error, 100)}): run the same command again, "
            "it goes on where it stopped"
        ) from error
    raise ModelLoadError(f"{url} ended {num_missing} bytes early: run the same command again")
