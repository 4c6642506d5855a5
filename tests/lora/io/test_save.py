"""Files are byte for byte what safetensors writes, but that its order of metadata changes from run to run."""

import json
import math

import pytest
import safetensors.torch
import torch

from hyperlora.lora.io.safetensors_file import find_non_finite, serialize_tensors


def parts(file: bytes) -> tuple[str, bytes]:
    """(header without its metadata, numbers)."""
    length = int.from_bytes(file[:8], "little")
    header = file[8 : 8 + length].decode()
    _, end = json.JSONDecoder().raw_decode(header, len('{"__metadata__":'))
    return header[end:], file[8 + length :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_are_what_the_library_writes(dtype: torch.dtype) -> None:
    tensors = {
        f"{name}.weight": torch.randn(*shape).to(dtype)
        for name, shape in (("b", (3, 5)), ("a", (2, 1, 3, 3)))
    }
    tensors |= {"a.alpha": torch.tensor(4.0), "z": torch.randn(4, 6).to(dtype).T}
    metadata = {"title": 'Zoë "1"\n', "a": "b"}
    ours = serialize_tensors(tensors, metadata)
    theirs = safetensors.torch.save(
        {k: t.contiguous() for k, t in tensors.items()}, {"format": "pt", **metadata}
    )
    assert parts(ours) == parts(theirs)
    assert len(ours) == len(theirs)
    assert (
        serialize_tensors(dict(reversed(tensors.items())), dict(reversed(metadata.items()))) == ours
    )
    loaded = safetensors.torch.load(ours)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_tensor_that_is_not_finite_is_named(bad: float) -> None:
    tensors = {"a": torch.ones(3), "b": torch.tensor([[1.0, bad]]), "c": torch.tensor([bad])}
    assert find_non_finite(tensors) == "b"
    assert find_non_finite({"a": tensors["a"]}) is None
    assert find_non_finite({"half": torch.full((9,), 60000.0, dtype=torch.float16)}) is None
