"""LoRA files in a process with diffusers alone give the images of ``generate_images``."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.lora.io.load import load_lora
from hyperlora.pipelines.image_to_lora import ImageToLora

SCRIPT = """
import sys
import torch
from diffusers import DiffusionPipeline
base, prompt, *paths = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(base)
for lora, image_path in zip(paths[::2], paths[1::2], strict=True):
    pipe.load_lora_weights(lora)
    generator = torch.Generator().manual_seed(7)
    images = pipe(prompt, num_inference_steps=3, guidance_scale=2.0, generator=generator).images
    images[0].save(image_path)
    pipe.unload_lora_weights()
assert "hyperlora" not in sys.modules
"""
PROMPT = "a portrait of sks person"


def test_save_lora_gives_equal_images_in_diffusers(bundle: Any, tmp_path: Path) -> None:
    lora = ImageToLora.from_pretrained(str(bundle.model))(bundle.photo)
    base = load_diffusion_base(bundle.base)
    options: dict[str, Any] = {"seeds": [7], "num_inference_steps": 3, "guidance_scale": 2.0}
    (image,) = generate_images(base, [PROMPT], lora.weights, **options)
    (base_image,) = generate_images(base, [PROMPT], None, **options)
    images: dict[Path, Path] = {}
    for format in ("diffusers", "kohya"):
        path = lora.save(tmp_path / f"{format}.safetensors", format=format)
        images[path] = path.with_suffix(".png")
        assert load_lora(path, lora.weights.layout).metadata.base_model == base.id
    paths = [str(path) for pair in images.items() for path in pair]
    process = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(bundle.base), PROMPT, *paths],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    for path in images.values():
        expected = np.asarray(Image.open(path), int)
        assert np.abs(np.asarray(image, int) - expected).max() <= 2
        assert np.abs(np.asarray(base_image, int) - expected).mean() > 2, "the LoRA changes nothing"
