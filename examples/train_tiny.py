"""Train a tiny hypernetwork on drawn avatars; the identity score of unseen people rises.

Expected output (about two minutes on two CPU cores; numbers vary a little):
    step   0: identity 0.10
    step  80: identity 0.20
    step 160: identity 0.27
    step 240: identity 0.27
"""

import sys

import torch

from data_builder.avatars.captions import build_prompt
from data_builder.avatars.identity import sample_identity, sample_scene
from data_builder.avatars.rendering import render_portrait
from hyperlora import ImageToLora, generate_images, inject_lora, load_diffusion_base
from hyperlora.data.images import stack_images
from hyperlora.diffusion.losses import compute_denoising_loss
from hyperlora.encoders.identity_similarity import IdentitySimilarity
from hyperlora.features import ImageFeatures
from hyperlora.models.hypernetwork import Hypernetwork

NUM_STEPS, NUM_PEOPLE = (int(argument) for argument in (sys.argv[1:] or ["240", "256"]))
TEST_SEEDS = range(1_100_000, 1_100_012)  # people that no network has seen
base = load_diffusion_base("checkpoints/avatars/base")
encoder = ImageToLora.from_pretrained("checkpoints/avatars/image-to-lora").encoder
evaluator = IdentitySimilarity.from_pretrained("checkpoints/avatars/evaluator")


def draw(seeds, scene):
    people = [(sample_identity(seed), sample_scene(seed, scene)) for seed in seeds]
    return stack_images([render_portrait(*person) for person in people])


@torch.no_grad()
def measure_identity(network):
    photos = draw(TEST_SEEDS, 0)
    prompts = ["a portrait of sks person, smiling, wearing a red hoodie"] * len(photos)
    loras = network(encoder(photos[:, None]))  # one photo of each: [people, 1, 3, 128, 128]
    images = generate_images(base, prompts, loras, seeds=TEST_SEEDS, num_inference_steps=8)
    pairs = zip(photos.split(1), stack_images(images).split(1), strict=True)
    return torch.cat([evaluator(photo, image) for photo, image in pairs]).mean()


# two portraits of each person: features of one, latents and prompt of the other
seeds = range(NUM_PEOPLE)
with torch.no_grad():
    tokens = encoder(draw(seeds, 0)[:, None]).tokens  # [people, 1, tokens, width]
    latents = base.encode_images(draw(seeds, 1))  # [people, channels, 16, 16]
    prompts = [build_prompt(sample_scene(seed, 1)) for seed in seeds]
    text = base.encode_prompts(prompts)["prompt_embeds"]  # [people, tokens, width]

torch.manual_seed(0)
layout = base.make_layout("attention+mlp", 4)
network = Hypernetwork(layout, encoder.width, width=128, head_options={"size": 16})
optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, NUM_STEPS + 1)
for step in range(NUM_STEPS + 1):
    if step % 80 == 0:
        print(f"step {step:3d}: identity {measure_identity(network):.2f}")
    batch = torch.randperm(NUM_PEOPLE)[:16]
    with inject_lora(base.denoiser, network(ImageFeatures(tokens[batch]))):  # a LoRA per sample
        inputs = latents[batch], {"prompt_embeds": text[batch]}
        loss = compute_denoising_loss(base.predict, base.noise_scheduler, *inputs, shift=3).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    lr_schedule.step()
