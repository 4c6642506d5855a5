"""``TensorHeader``: names, types and shapes of the tensors of a safetensors file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

from hyperlora.errors import InvalidLoraFileError, ModelLoadError
from hyperlora.lora.io.safetensors_file import read_header
from hyperlora.models.i2l import compute_shape_digest

_MAX_HEADER_BYTES: Final = 16 << 20
_BYTES_PER_NUMBER: Final = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        dtype: The type as safetensors names it, e.g. ``F16``.
        shape: Sizes of the axes.
        begin: The first byte of its data in the file.
        end: The byte behind the last.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """Count of the numbers."""
        return prod(self.shape)


@dataclass(frozen=True)
class TensorHeader:
    """The header of a safetensors file.

    Attributes:
        tensors: Every tensor by its name, sorted.
        metadata: The texts of the file's own metadata.
    """

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    @property
    def numel(self) -> int:
        """Count of the numbers of all tensors."""
        return sum(entry.numel for entry in self.tensors.values())

    @property
    def digest(self) -> str:
        """MD5 of names and shapes (``compute_shape_digest``)."""
        return compute_shape_digest({name: entry.shape for name, entry in self.tensors.items()})

    def make_part(self, prefix: str) -> tuple[bytes, list[tuple[int, int]], int]:
        """Plan a safetensors file of those tensors whose names begin with a prefix.

        Args:
            prefix: The beginning of the names.

        Returns:
            The new file's header, the ranges of this file that follow it (first byte and byte
            behind the last, joined where they touch), and the size of the new file.
        """
        chosen = sorted(
            ((name, entry) for name, entry in self.tensors.items() if name.startswith(prefix)),
            key=lambda item: item[1].begin,
        )
        ranges: list[tuple[int, int]] = []
        entries: dict[str, object] = {}
        offset = 0
        for name, entry in chosen:
            num_bytes = entry.end - entry.begin
            offsets = [offset, offset + num_bytes]
            entries[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
            offset += num_bytes
            if ranges and ranges[-1][1] == entry.begin:
                ranges[-1] = (ranges[-1][0], entry.end)
            else:
                ranges.append((entry.begin, entry.end))
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        return header, ranges, len(header) + offset


def parse_header(start: bytes, file_bytes: int, file_name: str) -> TensorHeader:
    """Parse the header at the start of a safetensors file.

    Args:
        start: The first bytes of the file, with the whole header.
        file_bytes: The size of the file.
        file_name: The name of the file in messages.

    Returns:
        The header.

    Raises:
        ModelLoadError: It is malformed, or the file is shorter than it says.
    """
    data_begin = 8 + int.from_bytes(start[:8], "little")
    try:
        entries = read_header(start, file_bytes, file_name, _MAX_HEADER_BYTES)
        metadata = entries.pop("__metadata__", {})
        tensors = {
            name: TensorEntry(
                str(entry["dtype"]),  # type: ignore[index]
                tuple(int(size) for size in entry["shape"]),  # type: ignore[index]
                *(data_begin + int(offset) for offset in entry["data_offsets"]),  # type: ignore[index]
            )
            for name, entry in sorted(entries.items())
        }
        texts = {str(key): str(value) for key, value in dict(metadata).items()}  # type: ignore[call-overload]
    except InvalidLoraFileError as error:
        raise ModelLoadError(f"{error}: fetch it again") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"the header of {file_name} is damaged: fetch it again") from error
    for name, entry in tensors.items():
        num_bytes = entry.numel * _BYTES_PER_NUMBER.get(entry.dtype, 0)
        if entry.end > file_bytes:
            raise ModelLoadError(
                f"{file_name} is cut off: it has {file_bytes} bytes, and {name} ends at "
                f"{entry.end}; fetch it again"
            )
        if num_bytes and entry.end - entry.begin != num_bytes:
            raise ModelLoadError(f"the header of {file_name} is damaged at {name}: fetch it again")
    return TensorHeader(tensors, texts)


def read_file_header(path: Path) -> TensorHeader:
    """Read the header of a safetensors file on this machine.

    Raises:
        ModelLoadError: The file is missing, cut off or no safetensors file.
    """
    if not path.is_file():
        raise ModelLoadError(f"there is no file {str(path)!r}: check the path")
    with path.open("rb") as file:
        start = file.read(8)
        start += file.read(int.from_bytes(start, "little"))
    return parse_header(start, path.stat().st_size, path.name)
