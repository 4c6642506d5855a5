"""``serialize_tensors`` equals safetensors, whose order of metadata is random."""

import json
import math

import pytest
import safetensors.torch
import torch

from hyperlora.lora.io.safetensors_file import find_non_finite, is_finite, serialize_tensors


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
    assert find_non_finite({"huge": torch.full((9,), 3e38)}) is None  # their sum is infinite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [(math.nan,), (math.inf,), (-math.inf, math.inf)])
def test_is_finite_finds_numbers_at_any_place(dtype: torch.dtype, bad: tuple[float, ...]) -> None:
    for size in (3, 31, 1000):
        numbers = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        assert is_finite(numbers)
        for i in range(0, size - len(bad), 7):
            with_bad = numbers.clone()
            with_bad[i : i + len(bad)] = torch.tensor(bad)
            assert not is_finite(with_bad)


def test_is_finite_asks_for_float32_numbers() -> None:
    assert not is_finite(torch.tensor([1e39], dtype=torch.float64))
    assert is_finite(torch.tensor([1e38, 3e38], dtype=torch.float64))
    assert not is_finite(torch.tensor([math.nan]).to(torch.float8_e4m3fn))
