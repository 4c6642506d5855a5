"""Device, offload, VAE tiles and compiled blocks of a pipeline."""

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hyperlora.compute import ComputeConfig
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.families.registry import get_pipeline_family
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.placement import compile_denoiser, place_pipeline
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.weights import LoraWeights
from tests.tiny_pipelines import get_tiny_pipeline


class PipelineRecorder:
    """Records what ``place_pipeline`` asks a pipeline for, where no accelerator can do it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, [*args, *kwargs.values()]))


@pytest.mark.parametrize(
    ("offload", "method"),
    [
        ("none", "to"),
        ("model", "enable_model_cpu_offload"),
        ("sequential", "enable_sequential_cpu_offload"),
        ("group", "enable_group_offload"),
    ],
)
def test_place_pipeline_calls_the_offload_of_diffusers(
    monkeypatch: pytest.MonkeyPatch, offload: Any, method: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    recorder = PipelineRecorder()
    family: Any = SimpleNamespace(pipeline=recorder)
    place_pipeline(family, ComputeConfig(device="cuda:0", offload=offload))
    ((name, arguments),) = recorder.calls
    assert name == method and arguments[0] == torch.device("cuda:0")


def test_place_pipeline_enables_vae_tiling_or_refuses() -> None:
    family = get_pipeline_family(deepcopy(get_tiny_pipeline("stable_diffusion").pipe))
    place_pipeline(family, ComputeConfig(device="cpu", vae_tiling=True))
    assert family.pipeline.vae.use_tiling
    del family.pipeline.vae.use_tiling
    with pytest.raises(InvalidArgumentError, match="AutoencoderKL cannot work on tiles"):
        place_pipeline(family, ComputeConfig(device="cpu", vae_tiling=True))


@pytest.mark.parametrize("name", ["stable_diffusion", "z_image"])
def test_compiled_blocks_compute_with_each_lora(name: str) -> None:
    tiny = get_tiny_pipeline(name)
    base = DiffusionBase("tiny", deepcopy(tiny.pipe))
    layout = base.make_layout("attention+mlp", 2)
    loras = [
        LoraWeights.unflatten(layout, 0.3 * torch.randn(2, layout.numel)) for _ in range(2)
    ]  # one LoRA for each of two samples
    conditions = base.family.encode_text(list(tiny.prompts))
    latents = torch.randn(2, 4, 16, 16)

    def predict(lora: LoraWeights | None) -> torch.Tensor:
        timesteps = torch.tensor([500, 500])
        if lora is None:
            return base.predict(latents, timesteps, conditions)
        with inject_lora(base.denoiser, lora):
            return base.predict(latents, timesteps, conditions)

    with torch.no_grad():
        expected = [predict(lora) for lora in (None, *loras)]
        compile_denoiser(base.family, backend="eager")
        predictions = [predict(lora) for lora in (None, *loras, None)]
    for prediction, value in zip(predictions, [*expected, expected[0]], strict=True):
        torch.testing.assert_close(prediction, value, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected[1], expected[2], atol=1e-3)
