"""Refine LoRAs by who is recognised in their own pictures: an identity loss, which needs no further photo."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.cpu import select_sdpa_kernel
from hyperlora.data.images import to_tensor
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.losses import add_noise, predict_x0
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.encoders.identity_embedder import IdentityEmbedder
from hyperlora.finetuning.examples import TrainingExamples
from hyperlora.lora.weights import LoraWeights
from hyperlora.progress import track


def refine_identity(
    base: DiffusionBase,
    predicted: LoraWeights,
    photos: Tensor,
    identity_embedder: IdentityEmbedder,
    prompts: Sequence[str],
    *,
    num_steps: int = 40,
    rank: int | None = None,
    out_rank: int | None = None,
    lr: float = 1e-3,
    batch_size: int = 4,
    regularization_weight: float = 0.5,
    seed: int = 0,
    progress_label: str | None = None,
    on_step: Callable[[int], None] | None = None,
) -> LoraWeights:
    """Fit a LoRA of ``rank`` (that of ``predict_loras`` unless given) above ``predict_loras`` (batch K) so that pictures drawn
    with both show whom ``load_photos`` [K, views, 3, h, w] in [0, 1] show; merged by SVD to ``out_rank``.

    Pictures are drawn under ``prompts`` first. Each step noises ``batch_size`` of them and decodes what the denoiser expects
    behind the noise; the loss is 1 - cos(identity of that, of the photos), as identity losses are taken of one step
    (PuLID, 2404.16022, §3.2), plus ``regularization_weight`` times the squared distance, in latents, from what it expects with
    ``predict_loras`` alone, which holds all that the prompt asked for. The same arguments give the same LoRAs; ``on_step`` is
    told every step, as in ``fine_tune_loras``.
    """
    k, layout = len(photos), predicted.layout.with_rank(rank or predicted.layout.rank)
    target_embeds, self_images = (
        identity_embedder.embed_subjects(photos),
        _sample_self_images(base, predicted, prompts, seed),
    )
    init_std = (sum(s.in_features for s in layout.targets) / len(layout.targets)) ** -0.5
    noise_scheduler = base.noise_scheduler
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        codes = (
            LoraWeights.zeros(layout, (), init_std)
            .flatten()
            .to(photos.device)
            .repeat(k, 1)
            .requires_grad_()
        )
    optimizer = torch.optim.Adam([codes], lr)
    min_timestep, max_timestep = (
        int(share * noise_scheduler.config.num_train_timesteps) for share in (0.2, 0.9)
    )
    for step in (
        track(range(1, num_steps + 1), progress_label, "steps", num_steps)
        if progress_label
        else range(1, num_steps + 1)
    ):
        if on_step is not None:
            on_step(step)
        latents, conditions = self_images.gather_examples(
            torch.randint(len(prompts), (batch_size, k), generator=generator).to(photos.device)
        )
        timesteps = torch.randint(
            min_timestep, max_timestep, (len(latents),), generator=generator
        ).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy_latents, _ = add_noise(noise_scheduler, latents, noise, timesteps)
        with torch.no_grad():
            reference_x0 = _predict_x0(base, predicted, noisy_latents, timesteps, conditions)
        with select_sdpa_kernel(noisy_latents, noisy_latents[0, 0].numel()):
            pred_x0 = _predict_x0(
                base,
                predicted + LoraWeights.unflatten(layout, codes),
                noisy_latents,
                timesteps,
                conditions,
            )
            identity_similarity = (
                identity_embedder(base.decode_latents(pred_x0))
                * target_embeds.repeat(batch_size, 1)
            ).sum(-1)
        loss = (
            1
            - identity_similarity
            + regularization_weight
            * F.mse_loss(pred_x0, reference_x0, reduction="none").mean((1, 2, 3))
        )
        (codes.grad,) = torch.autograd.grad(loss.view(batch_size, k).mean(0).sum(), codes)
        optimizer.step()
    refined = predicted + LoraWeights.unflatten(layout, codes.detach())
    return refined.resize(out_rank or predicted.layout.rank)


def _predict_x0(
    base: DiffusionBase,
    lora: LoraWeights,
    noisy_latents: Tensor,
    timesteps: Tensor,
    conditions: dict[str, Any],
) -> Tensor:
    """The clean latents that the denoiser with ``loras`` expects behind ``noisy_latents``."""
    with inject_lora(base.denoiser, lora):
        return predict_x0(
            base.noise_scheduler,
            noisy_latents,
            base.denoiser(noisy_latents, timesteps, **conditions).sample,
            timesteps,
        )


@torch.no_grad()
def _sample_self_images(
    base: DiffusionBase,
    loras: LoraWeights,
    prompts: Sequence[str],
    seed: int,
    num_inference_steps: int = 6,
) -> TrainingExamples:
    """What each LoRA draws under each of the prompts."""
    n, size, latents = len(prompts), base.resolution, []
    for i in range(len(loras)):
        images = generate_images(
            base,
            prompts,
            loras[[i] * n],
            seeds=range(seed, seed + n),
            num_inference_steps=num_inference_steps,
        )
        latents.append(base.encode_images(torch.stack([to_tensor(p, size) for p in images])))
    conditions = base.encode_prompts(list(prompts))
    single_subject = TrainingExamples(latents[0][None], _add_batch_dim(conditions))
    return TrainingExamples(
        torch.stack(latents), single_subject.expand_subjects(len(loras)).conditions
    )


def _add_batch_dim(conditions: dict[str, Any]) -> dict[str, Any]:
    """[n, ...] to [1, n, ...], nested as it is."""
    return {k: _add_batch_dim(v) if isinstance(v, dict) else v[None] for k, v in conditions.items()}
