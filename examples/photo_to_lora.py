"""One photo to a LoRA file, and an image with it.

Expected output:
    me.safetensors: rank 4, 81 target modules, trigger phrase 'sks person'
    out.png: (256, 128), without the LoRA and with it
"""

from PIL import Image

from hyperlora import ImageToLora, generate_images, load_diffusion_base

PHOTO = "checkpoints/avatars/test/subjects/person-1100000/0.webp"

# photo → LoRA: weights with the metadata of a complete file
model = ImageToLora.from_pretrained("checkpoints/avatars/image-to-lora")
lora = model([PHOTO])
lora.save("me.safetensors")
layout = lora.weights.layout
print(
    f"me.safetensors: rank {layout.rank}, {len(layout.targets)} target modules, "
    f"trigger phrase {lora.metadata.trigger_phrase!r}"
)

# LoRA → image: the same prompt and the same seed without and with it
base = load_diffusion_base("checkpoints/avatars/base")
prompt = f"a portrait of {model.trigger_phrase}, smiling, wearing a red hoodie, sky background"
images = [
    generate_images(base, [prompt], weights, seeds=[7])[0] for weights in (None, lora.weights)
]
sheet = Image.new("RGB", (256, 128))
for i, image in enumerate(images):
    sheet.paste(image, (128 * i, 0))
sheet.save("out.png")
print(f"out.png: {sheet.size}, without the LoRA and with it")
