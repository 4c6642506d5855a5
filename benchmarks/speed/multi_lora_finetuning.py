"""K LoRAs fitted at once against one after the other with PEFT and diffusers: same base, data, steps, Adam and noise.

    python benchmarks/fitting.py [--k 32] [--steps 30] [--batch 1]

Prints seconds per subject of both, their ratio, and both final losses.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from peft import LoraConfig

from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.diffusion.conditions import map_tensors
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.diffusion.losses import compute_denoising_loss
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.finetuning.config import FineTuneConfig
from hyperlora.finetuning.examples import SubjectRng, TrainingExamples
from hyperlora.finetuning.refine import make_photo_examples
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.weights import LoraWeights

LR = 1e-3


def fit_multi_lora(
    base: DiffusionBase, examples: TrainingExamples, start: LoraWeights, steps: int, batch_size: int
) -> tuple[float, float]:
    """Seconds per subject and the mean loss of the last ten steps."""
    start_time = time.perf_counter()
    unflatten_codes = partial(LoraWeights.unflatten, start.layout)
    result = fine_tune_loras(
        base.denoiser,
        base.noise_scheduler,
        examples,
        start.flatten(),
        unflatten_codes,
        FineTuneConfig(
            num_steps=steps, lr=LR, batch_size=batch_size, seeds=range(len(start))
        ),
    )
    return (time.perf_counter() - start_time) / len(start), float(result.losses[-10:].mean())


def fit_with_peft(
    base: DiffusionBase,
    examples: TrainingExamples,
    start: LoraWeights,
    steps: int,
    batch_size: int,
    encode_fn: Callable[[int], TrainingExamples] | None = None,
) -> tuple[float, float]:
    """The same with ``unet.add_adapter`` per subject, as DreamBooth-LoRA scripts do it; with ``encode_fn``, a
    subject's examples are made anew for every step."""
    unet, losses = base.denoiser, []
    start_time = time.perf_counter()
    for i in range(len(start)):
        targets = [site.path for site in start.layout.targets]
        unet.add_adapter(
            LoraConfig(r=start.layout.rank, lora_alpha=start.layout.rank, target_modules=targets)
        )
        parameters = dict(unet.named_parameters())
        with torch.no_grad():
            for site, down, up in zip(start.layout.targets, start.down, start.up, strict=True):
                parameters[f"{site.path}.lora_A.default.weight"].copy_(down[i])
                parameters[f"{site.path}.lora_B.default.weight"].copy_(up[i])
        optimizer = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], LR)
        rng = SubjectRng([i])  # the timesteps and noise that it has among all
        subject_examples = TrainingExamples(
            examples.latents[i : i + 1], map_tensors(lambda t, i=i: t[i : i + 1], examples.conditions)
        )
        for step in range(steps):
            if encode_fn is not None:
                subject_examples = encode_fn(i)
            indices, noise_sample = rng.sample_batch(
                subject_examples, batch_size, torch.tensor([0])
            )
            latents, conditions = subject_examples.gather_examples(indices)
            loss = compute_denoising_loss(
                unet, base.noise_scheduler, latents, noise_sample=noise_sample, **conditions
            ).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step >= steps - 10:
                losses.append(loss.item())
        unet.unload_lora()
    return (time.perf_counter() - start_time) / len(start), sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    arguments = parser.parse_args()
    disable_malloc_trim()
    torch.manual_seed(0)
    base = load_diffusion_base(pretrained.BASE_DIR)
    layout = make_layout({"unet": base.denoiser}, "attention+mlp", 4, base.id)
    photos = load_benchmark(pretrained.BENCHMARK_DIR, base.resolution, arguments.k).photos
    examples = make_photo_examples(base, photos, "a portrait of sks person")
    start = LoraWeights.zeros(layout, (arguments.k,), 0.05)
    for batch in arguments.batch:
        multi_lora_time_s, multi_lora_loss = fit_multi_lora(
            base, examples, start, arguments.steps, batch
        )
        peft_time_s, peft_loss = fit_with_peft(base, examples, start, arguments.steps, batch)
        print(
            f"batch {batch}: at once {multi_lora_time_s:.3f} s, one by one {peft_time_s:.3f} s per subject, ratio {peft_time_s / multi_lora_time_s:.2f}; "
            f"final loss {multi_lora_loss:.4f} and {peft_loss:.4f}"
        )


if __name__ == "__main__":
    main()
