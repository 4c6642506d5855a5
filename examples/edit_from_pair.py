"""The edit between two images, made on another image, and undone.

Expected output:
    edit.safetensors: rank 20
    glasses: round glasses → none → round glasses
"""

import torch

from hyperlora import PairToLora, load_diffusion_base
from hyperlora.data.images import read_image, stack_images
from hyperlora.diffusion.image_editing import edit_images
from hyperlora.encoders.attribute_classifier import AttributeClassifier

FOLDER = "checkpoints/avatars/test-edits/000-glasses"
before, after = f"{FOLDER}/shown-0_before.webp", f"{FOLDER}/shown-0_after.webp"  # takes them off
other = read_image(f"{FOLDER}/other-0_before.webp")

model = PairToLora.from_pretrained("checkpoints/avatars/pair-to-lora")
lora = model((before, after))
lora.save("edit.safetensors")
print(f"edit.safetensors: rank {lora.weights.layout.rank}")

# the LoRA makes the edit, its negative undoes it
base = load_diffusion_base("checkpoints/avatars/edit-base")
options = {"seeds": [0], "num_inference_steps": 1, "preserve_unedited": True}
edited = edit_images(base, [other], lora.weights, **options)[0]
undone = edit_images(base, [edited], -lora.weights, **options)[0]
edited.save("edited.png")
undone.save("undone.png")

evaluator = AttributeClassifier.from_pretrained("checkpoints/avatars/evaluator")
with torch.no_grad():
    prediction = evaluator(stack_images([other, edited, undone]))
labels = [attributes["glasses"] for attributes in evaluator.predict_labels(prediction)]
print(f"glasses: {' → '.join(labels)}")
