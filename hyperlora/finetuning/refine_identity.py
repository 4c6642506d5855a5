"""Refine LoRAs by an identity loss on images that the LoRAs themselves generate."""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hyperlora.cpu import select_sdpa_kernel
from hyperlora.data.batching import split_batches
from hyperlora.data.images import to_tensor
from hyperlora.diffusion.conditions import Conditions, map_tensors
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.noise_schedule import NoiseSchedule
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.encoders.identity_embedder import IdentityEmbedder
from hyperlora.finetuning.config import RefineConfig
from hyperlora.finetuning.examples import TrainingExamples
from hyperlora.finetuning.refine import resize_sum
from hyperlora.lora.weights import LoraWeights
from hyperlora.seeds import compute_seed

TIMESTEP_RANGE: Final = (0.2, 0.9)
"""Range of training timesteps, as fractions of all: identity is visible in x0 at neither end."""


def refine_identity(
    base: DiffusionBase,
    predicted: LoraWeights,
    photos: Tensor,
    identity_embedder: IdentityEmbedder,
    prompts: Sequence[str],
    config: RefineConfig | None = None,
    *,
    regularization_weight: float = 0.5,
) -> LoraWeights:
    """Fit a LoRA on top of each predicted LoRA so that images show the identity of the photos.

    First each predicted LoRA generates one image per prompt. Each step adds noise to
    ``batch_size`` of these latents and predicts x0, the clean latents, in one denoiser call. With
    f the identity embedder, D the VAE decoder and x0_ref the prediction without the LoRA on top,

        loss = 1 - cos(f(D(x0)), f(photos)) + λ mean((x0 - x0_ref)²)

    The identity loss on a one-step prediction follows PuLID (2404.16022, §3.2). The second term
    keeps what the prompt describes. The same arguments give the same LoRAs.

    Args:
        base: The frozen base.
        predicted: The LoRAs to refine, a batch [K].
        photos: Photos of each subject [K, views, 3, h, w] in [0, 1].
        identity_embedder: Maps images to identity embeddings of length 1.
        prompts: Prompts of the images to train on.
        config: Steps, ranks, learning rate and seed; by default ``RefineConfig()``.
        regularization_weight: λ, weight of the distance to the prediction without the LoRA on top.

    Returns:
        The refined LoRAs, a batch [K], on the device of the base. Without ``config.out_rank``
        they have all directions of both.

    Raises:
        InvalidArgumentError: The base is offloaded, so that no gradient flows through it.
    """
    base.check_gradients()
    config, device = config or RefineConfig(), base.device
    predicted = predicted.to(device)
    num_subjects, batch_size = len(photos), config.batch_size
    config.check_ranks(predicted.layout)
    layout = predicted.layout.with_rank(config.rank or predicted.layout.rank)
    target_embeds = identity_embedder.embed_subjects(photos).to(device)  # [K, features]
    self_images = _sample_self_images(base, predicted, prompts, config.seed, config.on_step)
    noise_schedule = NoiseSchedule(base.noise_scheduler)
    num_timesteps = noise_schedule.num_train_timesteps
    min_timestep, max_timestep = (int(share * num_timesteps) for share in TIMESTEP_RANGE)
    init_lora = LoraWeights.init_batch(layout, num_subjects, config.seed, device)
    codes = init_lora.flatten().requires_grad_()  # [K, P]
    optimizer = torch.optim.Adam([codes], config.lr)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in config.fine_tune.iterate_steps():
        # noisy latents of random images of each subject; n = batch_size * K
        indices = torch.randint(len(prompts), (batch_size, num_subjects), generator=generator)
        latents, conditions = self_images.gather_examples(indices.to(device))  # [n, c, h, w]
        timesteps = torch.randint(
            min_timestep, max_timestep, (len(latents),), generator=generator
        ).to(latents.device)  # [n]
        noise = torch.randn(latents.shape, generator=generator).to(latents)  # [n, c, h, w]
        noisy_latents, _ = noise_schedule.add_noise(latents, noise, timesteps)
        # x0 without and with the LoRA on top
        with torch.no_grad():
            reference_x0 = _predict_x0(base, predicted, noisy_latents, timesteps, conditions)
        with select_sdpa_kernel(noisy_latents, noisy_latents[0, 0].numel()):
            lora = predicted + LoraWeights.unflatten(layout, codes)
            pred_x0 = _predict_x0(base, lora, noisy_latents, timesteps, conditions)  # [n, c, h, w]
            embeds = identity_embedder(base.decode_latents(pred_x0)).to(device)  # [n, features]
        # loss = 1 - cos(f(D(x0)), f(photos)) + λ mean((x0 - x0_ref)²)
        cosine = (embeds * target_embeds.repeat(batch_size, 1)).sum(-1)  # [n]
        distance = F.mse_loss(pred_x0, reference_x0, reduction="none").mean((1, 2, 3))  # [n]
        loss = 1 - cosine + regularization_weight * distance  # [n]
        # mean over the batch of a subject, sum over subjects: each row gets its own gradient
        loss = loss.view(batch_size, num_subjects).mean(0).sum()
        (codes.grad,) = torch.autograd.grad(loss, codes)
        optimizer.step()
    refined = predicted + LoraWeights.unflatten(layout, codes.detach())
    return resize_sum(refined, config.out_rank)


def _predict_x0(
    base: DiffusionBase,
    lora: LoraWeights,
    noisy_latents: Tensor,
    timesteps: Tensor,
    conditions: Conditions,
) -> Tensor:
    """Predict the clean latents [n, c, h, w] with the LoRA in one denoiser call."""
    with inject_lora(base.denoiser, lora):
        model_output = base.predict(noisy_latents, timesteps, conditions)
    # in float32: half precision is too coarse for the difference of two predictions
    schedule = NoiseSchedule(base.noise_scheduler)
    return schedule.predict_x0(noisy_latents.float(), model_output.float(), timesteps)


@torch.no_grad()
def _sample_self_images(
    base: DiffusionBase,
    loras: LoraWeights,
    prompts: Sequence[str],
    seed: int,
    on_step: Callable[[int], None] | None = None,
    num_inference_steps: int = 6,
) -> TrainingExamples:
    """Generate one image per LoRA and prompt: latents [K, prompts, c, h, w] with conditions.

    With ``on_step`` one image at a time, and the function is called with 0 before each.
    """
    latents = []
    prompt_chunks = list(split_batches(range(len(prompts)), 1 if on_step else len(prompts)))
    for i in range(len(loras)):
        images: list[Image.Image] = []
        for chunk in prompt_chunks:
            if on_step is not None:
                on_step(0)
            images += generate_images(
                base,
                [prompts[j] for j in chunk],
                loras[[i] * len(chunk)],
                seeds=[compute_seed(seed, j) for j in chunk],
                num_inference_steps=num_inference_steps,
            )
        pixels = torch.stack([to_tensor(image, base.resolution) for image in images])
        latents.append(base.encode_images(pixels))  # [prompts, c, h, w]
    conditions = map_tensors(
        lambda value: value.expand(len(loras), *value.shape),
        base.encode_prompts(list(prompts)),  # [prompts, ...]
    )  # [K, prompts, ...]
    return TrainingExamples(torch.stack(latents), conditions)
