"""K LoRAs fine-tuned together against one after another with PEFT: same base, data, steps,
optimizer and noise.

    python -m benchmarks.speed.multi_lora_finetuning [--num-loras 32] [--steps 30] [--batch-size 1]

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
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.finetuning.config import FineTuneConfig
from hyperlora.finetuning.examples import SubjectRng, TrainingExamples
from hyperlora.finetuning.refine import make_photo_examples
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.weights import LoraWeights

LR = 1e-3
NUM_FINAL_STEPS = 10
"""Last steps whose mean loss is the final loss."""


def fit_multi_lora(
    base: DiffusionBase,
    examples: TrainingExamples,
    init_loras: LoraWeights,
    num_steps: int,
    batch_size: int,
) -> tuple[float, float]:
    """Fine-tune all LoRAs together.

    Args:
        base: Frozen base model.
        examples: Examples of the K subjects.
        init_loras: LoRAs to start from, a batch [K].
        num_steps: Optimizer steps.
        batch_size: Examples of each subject per step.

    Returns:
        Seconds per subject and the final loss.
    """
    start_time = time.perf_counter()
    result = fine_tune_loras(
        base,
        examples,
        init_loras.flatten(),
        partial(LoraWeights.unflatten, init_loras.layout),
        FineTuneConfig(
            num_steps=num_steps, lr=LR, batch_size=batch_size, seeds=range(len(init_loras))
        ),
    )
    seconds = (time.perf_counter() - start_time) / len(init_loras)
    return seconds, float(result.losses[-NUM_FINAL_STEPS:].mean())


def fit_with_peft(
    base: DiffusionBase,
    examples: TrainingExamples,
    init_loras: LoraWeights,
    num_steps: int,
    batch_size: int,
    encode_fn: Callable[[int], TrainingExamples] | None = None,
) -> tuple[float, float]:
    """Fine-tune one LoRA after another with ``unet.add_adapter``, as DreamBooth-LoRA scripts do.

    Args:
        base: Frozen base model.
        examples: Examples of the K subjects.
        init_loras: LoRAs to start from, a batch [K].
        num_steps: Optimizer steps.
        batch_size: Examples of each subject per step.
        encode_fn: Encodes the examples of a subject anew at every step; None: ``examples`` are
            used.

    Returns:
        Seconds per subject and the final loss.
    """
    unet, layout = base.denoiser, init_loras.layout
    lora_config = LoraConfig(
        r=layout.rank,
        lora_alpha=layout.rank,
        target_modules=[target.path for target in layout.targets],
    )
    losses = []
    start_time = time.perf_counter()
    for i in range(len(init_loras)):
        unet.add_adapter(lora_config)
        parameters = dict(unet.named_parameters())
        with torch.no_grad():
            for target, down, up in zip(
                layout.targets, init_loras.down, init_loras.up, strict=True
            ):
                parameters[f"{target.path}.lora_A.default.weight"].copy_(down[i])
                parameters[f"{target.path}.lora_B.default.weight"].copy_(up[i])
        optimizer = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], LR)
        rng = SubjectRng([i])  # the timesteps and noise of subject i among all
        subject_examples = TrainingExamples(
            examples.latents[i : i + 1],
            map_tensors(lambda value, i=i: value[i : i + 1], examples.conditions),
        )
        for step in range(num_steps):
            if encode_fn is not None:
                subject_examples = encode_fn(i)
            indices, noise_sample = rng.sample_batch(
                subject_examples, batch_size, torch.tensor([0])
            )
            latents, conditions = subject_examples.gather_examples(indices)
            loss = compute_denoising_loss(
                base.predict,
                base.noise_scheduler,
                latents,
                conditions,
                noise_sample=noise_sample,
            ).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step >= num_steps - NUM_FINAL_STEPS:
                losses.append(loss.item())
        unet.unload_lora()
    return (time.perf_counter() - start_time) / len(init_loras), sum(losses) / len(losses)


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-loras", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4])
    arguments = parser.parse_args()
    disable_malloc_trim()
    torch.manual_seed(0)
    base = load_diffusion_base(pretrained.BASE_DIR)
    layout = base.make_layout("attention+mlp", 4)
    benchmark = load_benchmark(pretrained.BENCHMARK_DIR, base.resolution, arguments.num_loras)
    examples = make_photo_examples(base, benchmark.photos, "a portrait of sks person")
    init_loras = LoraWeights.zeros(layout, (arguments.num_loras,), 0.05)
    for batch_size in arguments.batch_size:
        options = (base, examples, init_loras, arguments.steps, batch_size)
        multi_time_s, multi_loss = fit_multi_lora(*options)
        peft_time_s, peft_loss = fit_with_peft(*options)
        print(
            f"batch {batch_size}: together {multi_time_s:.3f} s, PEFT {peft_time_s:.3f} s "
            f"per subject, ratio {peft_time_s / multi_time_s:.2f}; "
            f"final loss {multi_loss:.4f} and {peft_loss:.4f}"
        )


if __name__ == "__main__":
    main()
