"""LoRA files in a process with diffusers alone give the images of ``generate_images``."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.lora.io.load import load_lora
from hyperlora.pipelines.image_to_lora import ImageToLora

SCRIPT = """
import sys
import torch
from diffusers import DiffusionPipeline
base, lora, prompt, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(base)
if lora != "none":
    pipe.load_lora_weights(lora)
generator = torch.Generator().manual_seed(7)
image = pipe(prompt, num_inference_steps=3, guidance_scale=2.0, generator=generator).images[0]
image.save(out)
assert "hyperlora" not in sys.modules
"""
PROMPT = "a portrait of sks person"


def generate_with_diffusers(bundle: Any, lora: Path | str, out: Path) -> np.ndarray:
    arguments = [sys.executable, "-I", "-c", SCRIPT, str(bundle.base), str(lora), PROMPT, str(out)]
    process = subprocess.run(arguments, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return np.asarray(Image.open(out), int)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_save_lora_gives_equal_images_in_diffusers(
    bundle: Any, tmp_path: Path, format: Any
) -> None:
    lora = ImageToLora.from_pretrained(str(bundle.model))(bundle.photo)
    path = lora.save(tmp_path / "me.safetensors", format=format)
    base = load_diffusion_base(bundle.base)
    (image,) = generate_images(
        base, [PROMPT], lora.weights, seeds=[7], num_inference_steps=3, guidance_scale=2.0
    )
    (base_image,) = generate_images(
        base, [PROMPT], None, seeds=[7], num_inference_steps=3, guidance_scale=2.0
    )
    expected = generate_with_diffusers(bundle, path, tmp_path / "expected.png")
    assert np.abs(np.asarray(image, int) - expected).max() <= 2
    assert np.abs(np.asarray(base_image, int) - expected).mean() > 2, "the LoRA changes nothing"
    assert load_lora(path, lora.weights.layout).metadata.base_model == base.id
