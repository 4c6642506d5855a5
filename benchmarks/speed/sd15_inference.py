"""Seconds and memory from photo to rank-4 LoRA file, for a random hypernetwork of Stable Diffusion
1.5's size.

python -m benchmarks.speed.sd15_inference
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from hyperlora.diffusion.target_modules import make_layout
from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.pipelines.image_to_lora import ImageToLora


def main() -> None:
    """Parse the command line and print the figures."""
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)  # else Stable Diffusion 1's defaults
    layout = make_layout({"unet": unet}, "attention", 4, "sd15")
    encoder = TimmEncoder("vit_base_patch16_224")
    network = Hypernetwork(
        layout, encoder.width, width=768, depth=4, num_heads=12, head_options={"size": 64}
    )
    model = ImageToLora(encoder, network).eval().requires_grad_(False)
    photo = Image.new("RGB", (512, 512), "gray")
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(4):
            start_time = time.perf_counter()
            model(photo).save(Path(folder) / "lora.safetensors")
            times.append(time.perf_counter() - start_time)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{len(layout.targets)} target modules, {layout.numel:,} parameters; "
        f"warm {min(times[1:]):.2f} s, peak {peak_gib:.2f} GiB"
    )


if __name__ == "__main__":
    main()
