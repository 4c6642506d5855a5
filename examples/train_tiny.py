"""Train a tiny hypernetwork on avatars drawn on the fly; its identity score rises from 0.

Expected output (about two minutes on two CPU cores; the numbers vary a little):
    step   0: denoising loss 0.203, identity 0.00
    step 200: denoising loss 0.190, identity 0.10
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
from hyperlora.models.hypernetwork import Hypernetwork

NUM_STEPS, EVAL_EVERY, BATCH_SIZE = int((sys.argv[1:] or ["200"])[0]), 50, 8
torch.manual_seed(0)
disable_malloc_trim()  # half of the time of a small network on a CPU is freed memory
base = load_diffusion_base("checkpoints/avatars/base")
encoder = ImageToLora.from_pretrained("checkpoints/avatars/image-to-lora").encoder
evaluator = IdentitySimilarity.from_pretrained("checkpoints/avatars/evaluator")
layout = make_layout({"unet": base.denoiser}, "attention+mlp", 4, base.id)
network = Hypernetwork(layout, encoder.width, width=64, head_options={"size": 16})
optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)


def draw(seeds, index):
    return stack_images(
        [render_portrait(sample_identity(s), sample_scene(s, index)) for s in seeds]
    )


@torch.no_grad()
def measure_identity(seeds=range(1_100_000, 1_100_006)):
    loras = network(encoder(draw(seeds, 0)[:, None]))  # one photo: [subjects, 1, 3, 128, 128]
    prompts = ["a portrait of sks person, smiling, wearing a red hoodie"] * len(seeds)
    images = generate_images(base, prompts, loras, seeds=seeds, num_inference_steps=8)
    pairs = zip(draw(seeds, 0).split(1), stack_images(images).split(1), strict=True)
    return torch.cat([evaluator(photo, image) for photo, image in pairs]).mean()


for step in range(NUM_STEPS + 1):
    seeds = range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)
    with torch.no_grad():
        features = encoder(draw(seeds, 0)[:, None])
        latents = base.encode_images(draw(seeds, 1))  # another portrait of the same people
        conditions = base.encode_prompts([build_prompt(sample_scene(s, 1)) for s in seeds])
    loras = network(features)
    with inject_lora(base.denoiser, loras):
        loss = compute_denoising_loss(
            base.denoiser, base.noise_scheduler, latents, shift=2.0, **conditions
        ).mean()
    optimizer.zero_grad()
    (loss + 1e-3 * loras.compute_mean_squared_norm()).backward()
    optimizer.step()
    if step % EVAL_EVERY == 0:
        print(f"step {step:3d}: denoising loss {loss:.3f}, identity {measure_identity():.2f}")
