"""The name of a base in a LoRA's metadata, by its classes and its size."""

from types import SimpleNamespace
from typing import Any

import pytest

from hyperlora.diffusion.families.flux import FluxFamily, FluxKontextFamily
from hyperlora.diffusion.families.flux2 import Flux2KleinFamily
from hyperlora.diffusion.families.registry import get_pipeline_family
from hyperlora.diffusion.families.stable_diffusion import StableDiffusionFamily
from hyperlora.diffusion.families.stable_diffusion_3 import StableDiffusion3Family
from tests.tiny_pipelines import FACTORIES, get_tiny_pipeline

NAMES = {
    "stable_diffusion": "custom-unet",
    "stable_diffusion_xl": "stable-diffusion-xl-v1-base",
    "instruct_pix2pix": "custom-unet",
    "instruct_pix2pix_xl": "stable-diffusion-xl-v1-base",
    "stable_diffusion_3": "stable-diffusion-3-3-medium",
    "flux": "flux-1-dev",
    "flux_schnell": "flux-1-schnell",
    "flux_kontext": "flux-1-kontext-dev",
    "z_image": "Z-Image",
    "chroma": "chroma",
    "lumina_2": "lumina-2",
    "hidream": "hidream-i1",
    "krea_2": "Krea-2",
    "krea_2_turbo": "Krea-2",
    "qwen_image_21": "Qwen-Image-2.1",
    "flux2": "Flux.2-dev",
    "flux2_edit": "Flux.2-dev",
    "flux2_klein": "Flux.2-klein-4b",
    "flux2_klein_edit": "Flux.2-klein-4b",
    "flux2_klein_distilled": "Flux.2-klein-4b",
    "qwen_image": "Qwen-Image",
    "qwen_image_edit": "Qwen-Image-Edit",
    "qwen_image_edit_plus": "Qwen-Image-Edit-Plus",
}
V_SCHEDULER = SimpleNamespace(config=SimpleNamespace(prediction_type="v_prediction"))
EPSILON_SCHEDULER = SimpleNamespace(config=SimpleNamespace(prediction_type="epsilon"))


@pytest.mark.parametrize("name", FACTORIES)
def test_name_of_each_pipeline(name: str) -> None:
    assert get_pipeline_family(get_tiny_pipeline(name).pipe).architecture == NAMES[name]


@pytest.mark.parametrize(
    ("cls", "scheduler", "config", "expected"),
    [
        (FluxFamily, None, {"guidance_embeds": True}, "flux-1-dev"),
        (FluxFamily, None, {"guidance_embeds": False}, "flux-1-schnell"),
        (FluxFamily, None, None, "flux-1-dev"),
        (FluxKontextFamily, None, {"guidance_embeds": False}, "flux-1-kontext-dev"),
        (Flux2KleinFamily, None, {"num_attention_heads": 24}, "Flux.2-klein-4b"),
        (Flux2KleinFamily, None, {"num_attention_heads": 32}, "Flux.2-klein-9b"),
        (StableDiffusion3Family, None, None, "stable-diffusion-3-3-medium"),
        (StableDiffusion3Family, None, {"qk_norm": None}, "stable-diffusion-3-3-medium"),
        (
            StableDiffusion3Family,
            None,
            {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
            "stable-diffusion-3-3-5-medium",
        ),
        (
            StableDiffusion3Family,
            None,
            {"qk_norm": "rms_norm", "dual_attention_layers": ()},
            "stable-diffusion-3-3-5-large",
        ),
        (StableDiffusionFamily, None, None, "stable-diffusion-v1"),
        (StableDiffusionFamily, None, {"cross_attention_dim": 768}, "stable-diffusion-v1"),
        (StableDiffusionFamily, None, {"cross_attention_dim": 320}, "custom-unet"),
        (
            StableDiffusionFamily,
            V_SCHEDULER,
            {"cross_attention_dim": 1024},
            "stable-diffusion-v2-768-v",
        ),
        (
            StableDiffusionFamily,
            EPSILON_SCHEDULER,
            {"cross_attention_dim": 1024},
            "stable-diffusion-v2-512",
        ),
    ],
)
def test_name_by_the_config_of_the_denoiser(
    cls: Any, scheduler: Any, config: dict[str, Any] | None, expected: str
) -> None:
    denoiser = None if config is None else SimpleNamespace(config=SimpleNamespace(**config))
    pipe = SimpleNamespace(transformer=denoiser, unet=denoiser, scheduler=scheduler)
    assert cls(pipe).architecture == expected
