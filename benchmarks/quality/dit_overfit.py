"""Overfit eight people through a hypernetwork and a tiny transformer of Z-Image or FLUX.2 klein.

    python -m benchmarks.quality.dit_overfit [z_image | flux2_klein] [--pretrain-steps 1200]
        [--steps 600] [--num-subjects 8] [--rank 4] [--rounds 32]

The transformer has the real class at a tiny size. There is no pretrained one of that size, so it is
first trained on portraits of other people than the eight, with one fixed random prompt embedding in
place of a text encoder. Then it is frozen, and a hypernetwork learns LoRAs of its attention from
one portrait to denoise the other portraits of the same person.

The table has the denoising loss of these portraits without LoRA (base), with the person's own and
with another's, at the same noise. A network that learns has own < base < shuffled. Without training
of the transformer (``--pretrain-steps 0``), any LoRA helps, and shuffled stays below base.
"""

import argparse
import time
from types import SimpleNamespace
from typing import Any, Final

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora import pretrained
from hyperlora.data.images import read_image, to_tensor
from hyperlora.data.subjects import list_subjects
from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.families.base import PipelineFamily
from hyperlora.diffusion.families.registry import FAMILIES
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.losses import compute_denoising_loss
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.features import ImageFeatures
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.pipelines.image_to_lora import ImageToLora

WIDTH: Final = 96
TEXT_WIDTH: Final = 32
BATCH_SIZE: Final = 16


def make_transformer(base: str, channels: int) -> nn.Module:
    """Make a tiny transformer.

    Args:
        base: ``z_image`` or ``flux2_klein``.
        channels: Of the latents.

    Returns:
        The transformer, with random weights.
    """
    if base == "z_image":
        return ZImageTransformer2DModel(
            in_channels=channels,
            dim=WIDTH,
            n_layers=4,
            n_refiner_layers=1,
            n_heads=4,
            n_kv_heads=4,
            cap_feat_dim=TEXT_WIDTH,
            axes_dims=[8, 8, 8],
            axes_lens=[256, 32, 32],
        )
    return Flux2Transformer2DModel(
        in_channels=channels,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(6, 6, 6, 6),
        guidance_embeds=False,
    )


def make_family(base: str, transformer: nn.Module) -> PipelineFamily:
    """Make the adapter of a pipeline that holds the transformer alone."""
    name = {"z_image": "ZImagePipeline", "flux2_klein": "Flux2KleinPipeline"}[base]
    pipeline: Any = SimpleNamespace(transformer=transformer, _execution_device=torch.device("cpu"))
    return FAMILIES[name](pipeline)


class Denoiser:
    """A transformer with its scheduler and one fixed prompt embedding."""

    def __init__(self, base: str, channels: int) -> None:
        self.transformer = make_transformer(base, channels)
        self.family = make_family(base, self.transformer)
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.prompt_embeds = torch.randn(1, 8, TEXT_WIDTH)  # a text encoder that knows nothing

    def compute_loss(self, latents: Tensor) -> Tensor:
        """Compute the denoising loss per sample, with any LoRAs that are injected."""
        n = len(latents)
        conditions: Conditions = {
            "prompt_embeds": self.prompt_embeds.expand(n, -1, -1),
            "prompt_embeds_mask": torch.ones(n, 8, dtype=torch.bool),
        }
        return compute_denoising_loss(self.family.predict, self.scheduler, latents, conditions)


@torch.no_grad()
def load_subjects(num_images: int = 8) -> tuple[Tensor, Tensor]:
    """Load all test people of the bundle.

    Args:
        num_images: Portraits of each.

    Returns:
        Features [people, portraits, tokens, width] and latents [people, portraits, c, h, w].
    """
    encoder = ImageToLora.from_pretrained(pretrained.IMAGE_TO_LORA_DIR).encoder
    vae = AutoencoderKL.from_pretrained(pretrained.BASE_DIR / "vae")
    features, latents = [], []
    for subject in list_subjects(pretrained.BENCHMARK_DIR / "subjects"):
        images = [read_image(photo) for photo in subject.photos[:num_images]]
        pixels = torch.stack([to_tensor(image, 128) for image in images])
        scaled = vae.encode(pixels * 2 - 1).latent_dist.mean * vae.config.scaling_factor
        features.append(encoder(pixels[None]).tokens[0])
        latents.append(scaled)
    return torch.stack(features), torch.stack(latents)


def pretrain(denoiser: Denoiser, latents: Tensor, num_steps: int) -> None:
    """Train the transformer on portraits [n, c, h, w], then freeze it."""
    parameters = list(denoiser.transformer.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99))
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50, 2 - 2 * step / num_steps)
        batch = latents[torch.randint(len(latents), (BATCH_SIZE,))]
        loss = denoiser.compute_loss(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    denoiser.transformer.requires_grad_(False)


def train_hypernetwork(
    denoiser: Denoiser, network: Hypernetwork, features: Tensor, latents: Tensor, num_steps: int
) -> None:
    """Train a hypernetwork on denoising other portraits than the one that it sees."""
    num_subjects, num_portraits = latents.shape[:2]
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, betas=(0.9, 0.99))
    subjects = torch.arange(num_subjects)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20, 2 - 2 * step / num_steps)
        order = torch.rand(num_subjects, num_portraits).argsort(1)  # [people, portraits]
        reference, *targets = order[:, :3].T
        loras = network(ImageFeatures(features[subjects, reference][:, None]))
        with inject_lora(denoiser.transformer, loras):
            batch = torch.cat([latents[subjects, target] for target in targets])
            loss = denoiser.compute_loss(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def evaluate(
    denoiser: Denoiser, network: Hypernetwork, features: Tensor, latents: Tensor, num_rounds: int
) -> dict[str, Tensor]:
    """Compute the losses per person and their controls, all with the same noise.

    Args:
        denoiser: The frozen transformer.
        network: The trained network.
        features: [people, portraits, tokens, width]; the first portrait makes the LoRA.
        latents: [people, portraits, c, h, w]; the others are denoised.
        num_rounds: Draws of noise and timestep for each portrait.

    Returns:
        Mean loss of each person [people] by the name of the LoRA.
    """
    loras = network(ImageFeatures(features[:, :1]))
    cases: dict[str, LoraWeights] = {
        "base": loras * 0.0,
        "own": loras,
        "shuffled": loras.shuffle_batch(),
    }
    losses = {}
    for name, weights in cases.items():
        torch.manual_seed(1)
        with inject_lora(denoiser.transformer, weights):
            rounds = [
                denoiser.compute_loss(latents[:, target])
                for _ in range(num_rounds)
                for target in range(1, latents.shape[1])
            ]
        losses[name] = torch.stack(rounds).mean(0)  # [people]
    return losses


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("base", nargs="?", choices=["z_image", "flux2_klein"], default="z_image")
    parser.add_argument("--pretrain-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--num-subjects", type=int, default=8)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=32, help="Draws of noise per portrait.")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    start = time.perf_counter()
    features, latents = load_subjects()
    if arguments.base == "flux2_klein":  # its latents are 2 x 2 patches, one token each
        latents = F.pixel_unshuffle(latents, 2)
    n = arguments.num_subjects
    denoiser = Denoiser(arguments.base, latents.shape[2])
    pretrain(denoiser, latents[n:].flatten(0, 1), arguments.pretrain_steps)
    pretrain_time_s = time.perf_counter() - start
    layout = make_layout({"transformer": denoiser.transformer}, "attention", arguments.rank, "tiny")
    network = Hypernetwork(layout, features.shape[-1], width=96, head_options={"size": 24})
    start = time.perf_counter()
    train_hypernetwork(denoiser, network, features[:n], latents[:n], arguments.steps)
    train_time_s = time.perf_counter() - start
    losses = evaluate(denoiser, network, features[:n], latents[:n], arguments.rounds)
    num_params = sum(p.numel() for p in denoiser.transformer.parameters())
    print(
        f"{type(denoiser.transformer).__name__} of {num_params / 1e6:.2f} M parameters, "
        f"{len(layout.targets)} targets; {pretrain_time_s:.0f} s of pretraining, "
        f"{train_time_s:.0f} s of training"
    )
    print("| LoRA | denoising loss | people below base |")
    print("|---|---|---|")
    for name, values in losses.items():
        count = int((values < losses["base"]).sum())
        print(f"| {name} | {values.mean():.4f} | {count} of {n} |")


if __name__ == "__main__":
    main()
