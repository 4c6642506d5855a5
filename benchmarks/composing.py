"""Composite of k LoRAs in one batched forward per step against k forwards with PEFT's ``set_adapters``, in one run.

python benchmarks/composing.py [--loras 4] [--steps 12] [--images 4]
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperlora import pretrained
from hyperlora.cpu import keep_heap
from hyperlora.diffusion.denoiser_calls import Call, caught
from hyperlora.diffusion.diffusion_base import load_base
from hyperlora.diffusion.multi_lora import composed
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.lora.io.save import save_lora
from hyperlora.pipelines.image_to_lora import ImageToLora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loras", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--images", type=int, default=4)
    arguments = parser.parse_args()
    keep_heap()
    base = load_base(pretrained.BASE)
    photos = load_benchmark(pretrained.BENCHMARK, base.resolution, arguments.loras).photos[:, :1]
    with torch.no_grad():
        loras = list(ImageToLora.from_pretrained(pretrained.MODEL, base=base).forward(photos))
    pipe = base.pipeline

    def latents(seed: int) -> Tensor:
        return pipe(
            "a portrait of sks person, smiling",
            num_inference_steps=arguments.steps,
            guidance_scale=3.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(seed),
        ).images

    def timed(name: str) -> tuple[float, list[Tensor]]:
        latents(0)  # warm up
        began = time.perf_counter()
        made = [latents(seed) for seed in range(arguments.images)]
        seconds = (time.perf_counter() - began) / arguments.images
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{name:34s} {seconds:.3f} s per image, {peak:.2f} GiB peak so far", flush=True)
        return seconds, made

    one, _ = timed("one LoRA less: the base")
    with composed(pipe, loras, "composite"):
        batched, ours = timed(f"composite of {len(loras)}, one forward")
    with tempfile.TemporaryDirectory() as folder:
        names = [f"l{i}" for i in range(len(loras))]
        for name, lora in zip(names, loras, strict=True):
            pipe.load_lora_weights(save_lora(lora, Path(folder) / f"{name}.safetensors"), adapter_name=name)
        with caught(pipe, _one_after_another(pipe, names)):
            reference, theirs = timed(f"composite of {len(loras)}, set_adapters")
    apart = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    print(f"ratio {batched / reference:.2f} (base alone {one / reference:.2f}); latents differ by at most {apart:.1e}")


def _one_after_another(pipe: Any, names: list[str]) -> Callable[[Call], Tensor]:
    def predict(call: Call) -> Tensor:
        made = []
        for name in names:
            pipe.set_adapters([name])
            made.append(call())
        return torch.stack(made).mean(0)

    return predict


if __name__ == "__main__":
    main()
