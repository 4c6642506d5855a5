"""Images become latents and latents images as in diffusers' own pipelines."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.diffusion.families.registry import get_pipeline_family
from hyperlora.diffusion.families.vae_precision import run_in_safe_precision
from tests.tiny_pipelines import FACTORIES, get_tiny_pipeline
from tests.tiny_pipelines.base import TinyPipeline, make_image


def sample_images(tiny: TinyPipeline, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the images that a pipeline samples, and the latents that it decoded."""
    latents = []

    def record_latents(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        latents.append(tensors["latents"])
        return {}

    images = tiny.pipe(
        prompt=list(tiny.prompts),
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(6),
        output_type="pt",
        callback_on_step_end=record_latents,
        **(tiny.arguments | arguments),
    ).images
    return images, latents[-1]


# the pipeline of InstructPix2Pix on SDXL shows its latents to no callback
@pytest.mark.parametrize("name", sorted(FACTORIES.keys() - {"instruct_pix2pix_xl"}))
def test_decode_latents_equals_the_pipeline(name: str) -> None:
    tiny = get_tiny_pipeline(name)
    images, latents = sample_images(tiny)
    decoded = get_pipeline_family(tiny.pipe).decode_latents(tiny.unpack(latents))
    opaque_images = images[:, :3]  # without the alpha of Qwen-Image 2.1
    torch.testing.assert_close(decoded, opaque_images, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["flux_kontext", "flux2", "flux2_klein", "qwen_image_edit", "qwen_image_edit_plus"]
)
def test_encode_images_equals_the_pipeline(name: str) -> None:
    pipe = get_tiny_pipeline(name).pipe
    images = make_image(count=2)[..., :64]
    pixels = pipe.image_processor.preprocess(images)
    if name.startswith("qwen"):
        pixels = pixels.unsqueeze(2)  # one frame
    expected = pipe._encode_vae_image(pixels, generator=torch.Generator())
    latents = get_pipeline_family(pipe).encode_images(images)
    assert latents.ndim == 4
    torch.testing.assert_close(latents, expected.view_as(latents), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["flux2", "flux2_klein", "qwen_image"])
def test_resolution_is_the_side_of_images_by_default(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = get_tiny_pipeline(name)
    monkeypatch.setattr(tiny.pipe, "default_sample_size", 12)
    images, _ = sample_images(tiny, height=None, width=None)
    resolution = get_pipeline_family(tiny.pipe).resolution
    assert images.shape[-2:] == (resolution, resolution)


@pytest.mark.parametrize("name", ["flux2", "flux2_klein", "qwen_image", "qwen_image_edit"])
def test_decode_latents_is_differentiable(name: str) -> None:
    family = get_pipeline_family(get_tiny_pipeline(name).pipe)
    latents = family.encode_images(make_image()).requires_grad_()
    family.decode_latents(latents).sum().backward()
    assert latents.grad is not None and latents.grad.abs().max() > 0


@pytest.mark.parametrize("name", FACTORIES)
def test_vae_gets_pixels_from_minus_1_to_1_and_images_are_cut_to_0_and_1(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = get_tiny_pipeline(name)
    family, vae = get_pipeline_family(tiny.pipe), tiny.pipe.vae
    encode, decode = vae.encode, vae.decode
    encoded: list[Tensor] = []

    def record_pixels(pixels: Tensor, *args: Any, **options: Any) -> Any:
        encoded.append(pixels[:, :3].reshape(-1, 3, *pixels.shape[-2:]))
        return encode(pixels, *args, **options)

    def exaggerate(*args: Any, **options: Any) -> Any:
        decoded = decode(*args, **options)
        decoded.sample = (decoded.sample - decoded.sample.mean()) * 100
        return decoded

    monkeypatch.setattr(vae, "encode", record_pixels)
    monkeypatch.setattr(vae, "decode", exaggerate)
    images = make_image()
    with torch.no_grad():
        decoded_images = family.decode_latents(family.encode_images(images))
    torch.testing.assert_close(encoded[0], 2 * images - 1)
    assert decoded_images.min() == 0 and decoded_images.max() == 1
    assert (decoded_images > 0.9).any() and (decoded_images < 0.1).any()


@pytest.mark.parametrize("name", FACTORIES)
def test_sides_are_multiples_of_the_patches(name: str) -> None:
    """A UNet takes each position of the VAE's latents; the transformers take patches of 2x2."""
    pipe = get_tiny_pipeline(name).pipe
    patch_size = 1 if hasattr(pipe, "unet") else 2
    assert get_pipeline_family(pipe).pixel_multiple == patch_size * pipe.vae_scale_factor


@pytest.mark.parametrize("name", ["stable_diffusion", "flux2_klein", "qwen_image", "krea_2"])
def test_vae_in_half_precision_takes_float32(name: str) -> None:
    pipe = deepcopy(get_tiny_pipeline(name).pipe).to(dtype=torch.bfloat16)
    family, images = get_pipeline_family(pipe), make_image(count=2)
    latents = family.encode_images(images)
    assert latents.dtype == torch.bfloat16
    torch.testing.assert_close(latents, family.encode_images(images.bfloat16()), atol=0.05, rtol=0)
    decoded = family.decode_latents(latents.float())
    assert decoded.dtype == torch.bfloat16
    assert torch.equal(decoded, family.decode_latents(latents))


@pytest.mark.parametrize("force_upcast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vae_that_overflows_in_float16_runs_in_float32(
    force_upcast: bool, dtype: torch.dtype
) -> None:
    vae = deepcopy(get_tiny_pipeline("stable_diffusion_xl").pipe.vae).to(dtype=dtype)
    vae.register_to_config(force_upcast=force_upcast)
    expected = torch.float32 if force_upcast and dtype == torch.float16 else dtype
    with run_in_safe_precision(vae):
        assert {parameter.dtype for parameter in vae.parameters()} == {expected}
    assert {parameter.dtype for parameter in vae.parameters()} == {dtype}
    with pytest.raises(KeyError), run_in_safe_precision(vae):
        raise KeyError
    assert vae.dtype == dtype, "also after an error"
