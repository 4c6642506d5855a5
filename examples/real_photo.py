"""One photograph to an SDXL LoRA by a network that others released, and an image with it.

Needs the extra ``face``, 12 GB of downloads, and a GPU for the image. For non-commercial use only.

Expected output:
    me.safetensors: 560 targets of rank 8
    out.png: (1024, 1024)
"""

import sys

import torch
from diffusers import DiffusionPipeline

from hyperlora.pipelines.auto import load_photo_model

photo = sys.argv[1] if len(sys.argv) > 1 else "me.jpg"

model = load_photo_model("bytedance-research/HyperLoRA")
lora = model([photo])
lora.save("me.safetensors", dtype=torch.float16)
layout = lora.weights.layout
print(f"me.safetensors: {len(layout.targets)} targets of rank {layout.rank}")

pipe = DiffusionPipeline.from_pretrained(
    "SG161222/RealVisXL_V4.0", torch_dtype=torch.float16, variant="fp16"
).to("cuda")
pipe.load_lora_weights("me.safetensors")
pipe.set_adapters(pipe.get_active_adapters(), lora.metadata.recommended_strength)
prompt = lora.metadata.extra["hyperlora.prompt_prefix"] + "a portrait photo, smiling, on a market"
image = pipe(prompt, num_inference_steps=20, guidance_scale=5).images[0]
image.save("out.png")
print(f"out.png: {image.size}")
