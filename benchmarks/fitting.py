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
from hyperlora.cpu import keep_heap
from hyperlora.diffusion.diffusion_base import Base, load_base
from hyperlora.diffusion.losses import denoising_loss
from hyperlora.diffusion.target_modules import layout_of
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.finetuning.examples import Chance, Examples
from hyperlora.finetuning.refine import photo_examples
from hyperlora.finetuning.trainer import fit
from hyperlora.lora.weights import LoraWeights

LR = 1e-3


def at_once(base: Base, examples: Examples, start: LoraWeights, steps: int, batch: int) -> tuple[float, float]:
    """Seconds per subject and the mean loss of the last ten steps."""
    began = time.perf_counter()
    expand = partial(LoraWeights.unflatten, start.layout)
    done = fit(
        base.denoiser, base.noise_schedule, examples, start.flatten(), expand, steps=steps, lr=LR, batch=batch,
        seeds=range(len(start)),
    )  # fmt: skip
    return (time.perf_counter() - began) / len(start), float(done.losses[-10:].mean())


def one_by_one(
    base: Base, examples: Examples, start: LoraWeights, steps: int, batch: int,
    encoded: Callable[[int], Examples] | None = None,
) -> tuple[float, float]:  # fmt: skip
    """The same with ``unet.add_adapter`` per subject, as DreamBooth-LoRA scripts do it; with ``encoded``, a
    subject's examples are made anew for every step."""
    unet, losses = base.denoiser, []
    began = time.perf_counter()
    for i in range(len(start)):
        sites = [site.path for site in start.layout.sites]
        unet.add_adapter(LoraConfig(r=start.layout.rank, lora_alpha=start.layout.rank, target_modules=sites))
        parameters = dict(unet.named_parameters())
        with torch.no_grad():
            for site, down, up in zip(start.layout.sites, start.down, start.up, strict=True):
                parameters[f"{site.path}.lora_A.default.weight"].copy_(down[i])
                parameters[f"{site.path}.lora_B.default.weight"].copy_(up[i])
        optimizer = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], LR)
        chance = Chance([i])  # the timesteps and noise that it has among all
        mine = Examples(examples.latents[i : i + 1], {k: v[i : i + 1] for k, v in examples.conditions.items()})
        for step in range(steps):
            if encoded is not None:
                mine = encoded(i)
            choice, draw = chance.draw(mine, batch, torch.tensor([0]))
            latents, conditions = mine.pick(choice)
            loss = denoising_loss(unet, base.noise_schedule, latents, draw=draw, **conditions).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step >= steps - 10:
                losses.append(loss.item())
        unet.unload_lora()
    return (time.perf_counter() - began) / len(start), sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    arguments = parser.parse_args()
    keep_heap()
    torch.manual_seed(0)
    base = load_base(pretrained.BASE)
    layout = layout_of({"unet": base.denoiser}, "attention+mlp", 4, base.id)
    photos = load_benchmark(pretrained.BENCHMARK, base.resolution, arguments.k).photos
    examples = photo_examples(base, photos, "a portrait of sks person")
    start = LoraWeights.zeros(layout, (arguments.k,), 0.05)
    for batch in arguments.batch:
        ours, our_loss = at_once(base, examples, start, arguments.steps, batch)
        theirs, their_loss = one_by_one(base, examples, start, arguments.steps, batch)
        print(
            f"batch {batch}: at once {ours:.3f} s, one by one {theirs:.3f} s per subject, ratio {theirs / ours:.2f}; "
            f"final loss {our_loss:.4f} and {their_loss:.4f}"
        )


if __name__ == "__main__":
    main()
