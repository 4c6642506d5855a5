"""``ComputeConfig``: what ``auto`` finds, and what each wrong name is told."""

import pytest
import torch

from hyperlora.compute import ComputeConfig, fork_rng
from hyperlora.errors import InvalidArgumentError


def set_accelerator(monkeypatch: pytest.MonkeyPatch, name: str | None, count: int = 1) -> None:
    device = None if name is None else torch.device(name)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count if name == "cuda" else 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: name == "mps")


def test_auto_is_the_cpu_in_float32_without_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    set_accelerator(monkeypatch, None)
    compute = ComputeConfig()
    assert compute.torch_device == torch.device("cpu") and compute.torch_dtype == torch.float32
    assert compute.describe() == "cpu, float32"


@pytest.mark.parametrize(
    ("name", "bf16", "dtype"),
    [
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
        ("mps", True, torch.float16),
        ("xpu", True, torch.bfloat16),
    ],
)
def test_auto_is_the_accelerator_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, name: str, bf16: bool, dtype: torch.dtype
) -> None:
    set_accelerator(monkeypatch, name)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
    compute = ComputeConfig(offload="model", vae_tiling=True, compile=True)
    assert compute.torch_device.type == name and compute.torch_dtype == dtype
    assert compute.describe().endswith(", offload model, VAE tiling, compiled")
    assert ComputeConfig(dtype="float32").torch_dtype == torch.float32
    assert ComputeConfig(device="cpu").torch_dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "unknown device 'gpu'; known: auto, cpu, cuda, cuda:N, mps"),
        ({"device": "meta"}, "unknown device 'meta'"),
        ({"device": "cuda:3"}, "device 'cuda:3' is not there: torch finds 2 of the kind cuda"),
        ({"device": "mps"}, "device 'mps' is not there: torch finds 0 of the kind mps"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; known: auto, float32, bfloat16, float16"),
        ({"offload": "disk"}, "unknown offload 'disk'; known: none, model, sequential, group"),
        ({"device": "cpu", "offload": "model"}, "offload 'model' frees the memory of an acc"),
    ],
)
def test_wrong_settings_are_named(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, str], message: str
) -> None:
    set_accelerator(monkeypatch, "cuda", 2)
    with pytest.raises(InvalidArgumentError, match=message):
        ComputeConfig(**options)


def test_fork_rng_puts_back_the_state_of_the_cpu() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with fork_rng(torch.device("cpu")):
        assert torch.equal(torch.rand(4), expected)
    assert torch.equal(torch.rand(4), expected)


def test_fork_rng_asks_for_no_card_but_that_of_the_computation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: devices)
    assert fork_rng(torch.device("cpu")) == fork_rng(torch.device("meta")) == []  # type: ignore[comparison-overlap]
    assert fork_rng(torch.device("cuda:1")) == [torch.device("cuda:1")]  # type: ignore[comparison-overlap]
