"""``serialize_tensors`` equals safetensors, whose order of metadata is random."""

import json
import math

import pytest
import safetensors.torch
import torch

from hyperlora.lora.io.safetensors_file import find_non_finite, serialize_tensors


def split_file(file: bytes) -> tuple[str, bytes]:
    """Header without its metadata, and the tensors."""
    length = int.from_bytes(file[:8], "little")
    header = file[8 : 8 + length].decode()
    _, end = json.JSONDecoder().raw_decode(header, len('{"__metadata__":'))
    return header[end:], file[8 + length :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_serialize_tensors_equals_safetensors(dtype: torch.dtype) -> None:
    tensors = {
        f"{name}.weight": torch.randn(*shape).to(dtype)
        for name, shape in (("b", (3, 5)), ("a", (2, 1, 3, 3)))
    }
    tensors |= {"a.alpha": torch.tensor(4.0), "z": torch.randn(4, 6).to(dtype).T}
    metadata = {"title": 'Zoë "1"\n', "a": "b"}
    file = serialize_tensors(tensors, metadata)
    expected = safetensors.torch.save(
        {k: t.contiguous() for k, t in tensors.items()}, {"format": "pt", **metadata}
    )
    assert split_file(file) == split_file(expected)
    assert len(file) == len(expected)
    assert (
        serialize_tensors(dict(reversed(tensors.items())), dict(reversed(metadata.items()))) == file
    )
    loaded = safetensors.torch.load(file)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_find_non_finite_names_the_first_tensor(bad: float) -> None:
    tensors = {"a": torch.ones(3), "b": torch.tensor([[1.0, bad]]), "c": torch.tensor([bad])}
    assert find_non_finite(tensors) == "b"
    assert find_non_finite({"a": tensors["a"]}) is None
    assert find_non_finite({"half": torch.full((9,), 60000.0, dtype=torch.float16)}) is None
