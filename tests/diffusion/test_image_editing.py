"""Edits against plain diffusers, each image with its own LoRA; preserved unedited regions."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.diffusion.image_editing import blend_edit_region, edit_images
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.errors import InvalidArgumentError, LayoutMismatchError
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.pipelines.prompt_lora import make_lora_from_prompts


@pytest.fixture(scope="module")
def base(bundle: Any) -> DiffusionBase:
    return load_diffusion_base(bundle.edit_base)


@pytest.fixture(scope="module")
def model(bundle: Any, base: DiffusionBase) -> PairToLora:
    return PairToLora.from_pretrained(bundle.pair_model, base=base)


def get_pair(bundle: Any, number: int = 0, edit: str = "inverted") -> tuple[Path, Path]:
    folder = bundle.edit_benchmark / edit
    return folder / f"shown-{number}_before.png", folder / f"shown-{number}_after.png"


def open_input(bundle: Any, number: int = 0) -> Image.Image:
    return Image.open(get_pair(bundle, number)[0]).convert("RGB").resize((16, 16))


def to_array(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


def test_edit_images_accepts_blends(bundle: Any, base: DiffusionBase) -> None:
    apply_edit = partial(
        edit_images,
        base,
        [open_input(bundle)],
        seeds=[5],
        num_inference_steps=2,
        guidance_scale=3.0,
    )
    plain = to_array(apply_edit(instructions="dark"))
    assert (to_array(apply_edit(instructions='("dark").blend(1)')) == plain).all()
    assert (to_array(apply_edit(instructions='("dark").blend(3)')) != plain).any()
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        apply_edit(instructions='("dark", "bright").blend(1)')


def test_edit_images_encodes_each_instruction_with_its_lora(base: DiffusionBase) -> None:
    layout = make_layout(
        {name: base.modules[name] for name in ("unet", "text_encoder")}, "attention", 2, base.id
    )
    loras = LoraWeights.unflatten(layout, 0.3 * torch.randn(2, layout.numel))
    apply_edit = partial(edit_images, base, instructions="dark", num_inference_steps=2)
    images = torch.rand(2, 3, 16, 16)
    batch = apply_edit(images, loras, seeds=[5, 6])
    alone = [apply_edit(images[i : i + 1], loras[i], seeds=[5 + i])[0] for i in range(2)]
    assert abs(to_array(batch) - to_array(alone)).max() <= 2


def test_edit_images_equals_plain_diffusers(
    bundle: Any, base: DiffusionBase, model: PairToLora, tmp_path: Path
) -> None:
    lora = model(get_pair(bundle)) * 8  # untrained: else too small to see
    lora.save(tmp_path / "edit.safetensors")
    image = open_input(bundle, 1)
    options = {"num_inference_steps": 3, "guidance_scale": 2.0}
    apply_edit = partial(edit_images, base, [image], seeds=[5], instructions="dark", **options)
    edited, edited_without_lora = apply_edit(lora=lora.weights), apply_edit()
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(bundle.edit_base)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path / "edit.safetensors")
    expected = pipe(
        "dark",
        image=image,
        image_guidance_scale=1.0,
        generator=torch.Generator().manual_seed(5),
        **options,
    ).images
    assert abs(to_array(edited) - to_array(expected)).max() <= 2
    assert abs(to_array(edited) - to_array(edited_without_lora)).max() > 5


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_edit_images_edits_each_image_with_its_lora(
    bundle: Any, base: DiffusionBase, model: PairToLora, guidance_scale: float
) -> None:
    loras = LoraWeights.stack(
        [model(get_pair(bundle, 0, edit)).weights * 5 for edit in ("inverted", "darker")]
    )
    images = [Image.open(get_pair(bundle, i)[0]) for i in (0, 1)]
    apply_edit = partial(edit_images, base, num_inference_steps=2, guidance_scale=guidance_scale)
    batch = apply_edit(images, loras, seeds=[1, 2], instructions=["a", "b"])
    for i, instruction in enumerate("ab"):
        alone = apply_edit([images[i]], loras[i], seeds=[i + 1], instructions=instruction)
        assert abs(to_array(alone) - to_array([batch[i]])).max() <= 2


def test_edit_images_refuses_base_that_edits_nothing(bundle: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="one that edits images was expected"):
        edit_images(load_diffusion_base(bundle.base), [Image.new("RGB", (16, 16))], seeds=[0])


def test_edit_images_refuses_wrong_numbers(base: DiffusionBase, model: PairToLora) -> None:
    image = Image.new("RGB", (16, 16))
    with pytest.raises(InvalidArgumentError, match="need as many seeds"):
        edit_images(base, [image], seeds=[])
    loras = model.forward(torch.rand(2, 1, 2, 3, 16, 16))
    with pytest.raises(InvalidArgumentError, match="one for each image"):
        edit_images(base, [image], loras, seeds=[0])
    with pytest.raises(InvalidArgumentError, match="guidance between 0 and 100"):
        edit_images(base, [image], seeds=[0], guidance_scale=float("nan"))


def test_edit_images_refuses_lora_of_missing_component(base: DiffusionBase) -> None:
    target = TargetModule("text_encoder_2.layers.0.self_attn.q_proj", 4, 4)
    lora = LoraWeights.zeros(LoraLayout((target,), 2, base.id))
    with pytest.raises(LayoutMismatchError, match=r"changes text_encoder_2, which base .* lacks"):
        edit_images(base, [Image.new("RGB", (16, 16))], lora, seeds=[0])


def test_edit_images_with_prompt_lora_equals_instruction(bundle: Any, base: DiffusionBase) -> None:
    instructions = ["dark", "a photo"]
    loras = make_lora_from_prompts(base, instructions, rank=16)
    assert loras.layout.rank == 16 and len(loras) == 2
    images = [Image.open(get_pair(bundle, i)[0]) for i in (0, 1)]
    apply_edit = partial(edit_images, base, images, seeds=[3, 4], num_inference_steps=2)
    by_lora = to_array(apply_edit(lora=loras))
    by_instruction = to_array(apply_edit(instructions=instructions))
    without = to_array(apply_edit())
    difference = abs(without - by_instruction)
    assert abs(by_lora - by_instruction).max() <= max(2, difference.max() / 5)
    assert difference.mean() > 4 * abs(by_lora - by_instruction).mean()


def test_blend_edit_region_keeps_unedited_pixels() -> None:
    image, edited = torch.rand(3, 8, 8), torch.rand(3, 8, 8)
    unedited = edited.clone()
    unedited[:, :, :4] = (edited[:, :, :4] + 0.5) % 1  # all but equal on the right
    unedited[:, :, 4:] += 0.02 * torch.rand(3, 8, 4)
    blended = blend_edit_region(image, edited, unedited)
    torch.testing.assert_close(blended[:, :, :4], edited[:, :, :4])
    torch.testing.assert_close(blended[:, :, 4:], image[:, :, 4:])


def test_edit_images_preserves_image_without_instruction(bundle: Any, base: DiffusionBase) -> None:
    image = Image.open(get_pair(bundle)[0])
    apply_edit = partial(edit_images, base, [image], seeds=[5], num_inference_steps=2)
    repainted = to_array(apply_edit())
    preserved = to_array(apply_edit(preserve_unedited=True))
    expected = to_array([open_input(bundle)])
    assert abs(preserved - expected).max() <= 1
    assert abs(repainted - expected).max() > 2
