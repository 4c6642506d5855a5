"""Train a tiny hypernetwork on drawn avatars; the identity score of unseen people rises.

Expected output (about two minutes on two CPU cores; the numbers vary a little):
    step   0: identity 0.00
    step 100: identity 0.00
    step 200: identity 0.00
    step 300: identity 0.00
"""

import sys

import torch

from data_builder.avatars.captions import build_prompt
from data_builder.avatars.identity import sample_identity, sample_scene
from data_builder.avatars.rendering import render_portrait
from hyperlora import ImageToLora, generate_images, inject_lora, load_diffusion_base, make_layout
from hyperlora.cpu import disable_malloc_trim
from hyperlora.data.images import stack_images
from hyperlora.diffusion.losses import compute_denoising_loss
from hyperlora.encoders.identity_similarity import IdentitySimilarity
from hyperlora.features import ImageFeatures
from hyperlora.models.hypernetwork import Hypernetwork

NUM_STEPS, NUM_PEOPLE = (int(a) for a in (sys.argv[1:] or ["240", "256"]))
TEST_SEEDS = range(1_100_000, 1_100_012)  # people that no network has seen

torch.manual_seed(0)
disable_malloc_trim()  # freed memory costs half of the time of a small network on a CPU
base = load_diffusion_base("checkpoints/avatars/base")
encoder = ImageToLora.from_pretrained("checkpoints/avatars/image-to-lora").encoder
evaluator = IdentitySimilarity.from_pretrained("checkpoints/avatars/evaluator")
layout = make_layout({"unet": base.denoiser}, "attention+mlp", 4, base.id)
network = Hypernetwork(layout, encoder.width, width=128, head_options={"size": 16})
optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, NUM_STEPS + 1, pct_start=0.1)


def draw(seeds, index):
    scenes = [sample_scene(seed, index) for seed in seeds]
    people = [sample_identity(seed) for seed in seeds]
    return stack_images([render_portrait(*pair) for pair in zip(people, scenes, strict=True)])


@torch.no_grad()
def measure_identity():
    photos = draw(TEST_SEEDS, 0)
    loras = network(encoder(photos[:, None]))  # one photo each: [subjects, 1, 3, 128, 128]
    prompts = ["a portrait of sks person, smiling, wearing a red hoodie"] * len(TEST_SEEDS)
    images = generate_images(base, prompts, loras, seeds=TEST_SEEDS, num_inference_steps=8)
    pairs = zip(photos.split(1), stack_images(images).split(1), strict=True)
    return torch.cat([evaluator(photo, image) for photo, image in pairs]).mean()


# two portraits of each person: features of the photo, latents and prompt of the target
seeds = range(NUM_PEOPLE)
with torch.no_grad():
    tokens = encoder(draw(seeds, 0)[:, None]).tokens  # [people, 1, tokens, width]
    latents = base.encode_images(draw(seeds, 1))
    prompts = [build_prompt(sample_scene(seed, 1)) for seed in seeds]
    text = base.encode_prompts(prompts)["encoder_hidden_states"]

for step in range(NUM_STEPS + 1):
    batch = torch.randperm(NUM_PEOPLE)[:16]
    loras = network(ImageFeatures(tokens[batch]))
    with inject_lora(base.denoiser, loras):
        loss = compute_denoising_loss(
            base.denoiser,
            base.noise_scheduler,
            latents[batch],
            shift=2.0,
            encoder_hidden_states=text[batch],
        ).mean()
    optimizer.zero_grad()
    (loss + 1e-3 * loras.compute_mean_squared_norm()).backward()
    optimizer.step()
    schedule.step()
    if step % 80 == 0:
        print(f"step {step:3d}: identity {measure_identity():.2f}")
