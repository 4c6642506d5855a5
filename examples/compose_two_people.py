"""Two people in one image, each with the LoRA of one photo, in a region of its own.

Expected output:
    two.png: (240, 128)
"""

from diffusers import DiffusionPipeline

from hyperlora import ImageToLora, compose_loras
from hyperlora.diffusion.multi_lora import CompositionConfig

SUBJECTS = "checkpoints/avatars/test/subjects"
photos = [f"{SUBJECTS}/person-1100000/0.webp", f"{SUBJECTS}/person-1100001/0.webp"]

model = ImageToLora.from_pretrained("checkpoints/avatars/image-to-lora")
loras = [model([photo]).weights for photo in photos]

# windowed: each region is denoised as an image of its own; they overlap in the middle
pipe = DiffusionPipeline.from_pretrained("checkpoints/avatars/base")
regions = [(0, 0, 0.53, 1), (0.47, 0, 1, 1)]  # left, top, right, bottom
config = CompositionConfig(regions=regions, windowed=True)
with compose_loras(pipe, loras, strategy="spatial", config=config):
    prompt = "a portrait of sks person, smiling"
    image = pipe(prompt, width=240, height=128, num_inference_steps=20, guidance_scale=3).images[0]
image.save("two.png")
print(f"two.png: {image.size}")
