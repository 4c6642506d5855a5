"""LoRA Composite of k LoRAs: one batched forward per step against k forwards with PEFT's
``set_adapters``.

python -m benchmarks.speed.composite_inference [--num-loras 4] [--steps 12] [--num-images 4]
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.diffusion.denoiser_calls import DenoiserCall, intercept_denoiser
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.multi_lora import compose_loras
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.lora.io.save import save_lora
from hyperlora.pipelines.image_to_lora import ImageToLora


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-loras", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--num-images", type=int, default=4)
    arguments = parser.parse_args()
    disable_malloc_trim()
    base = load_diffusion_base(pretrained.BASE_DIR)
    benchmark = load_benchmark(pretrained.BENCHMARK_DIR, base.resolution, arguments.num_loras)
    model = ImageToLora.from_pretrained(pretrained.IMAGE_TO_LORA_DIR, base=base)
    with torch.no_grad():
        loras = list(model.forward(benchmark.photos[:, :1]))
    pipe = base.pipeline

    def sample_latents(seed: int) -> Tensor:
        return pipe(
            "a portrait of sks person, smiling",
            num_inference_steps=arguments.steps,
            guidance_scale=3.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(seed),
        ).images

    def measure_latency(name: str) -> tuple[float, list[Tensor]]:
        sample_latents(0)  # warm up
        start_time = time.perf_counter()
        latent_samples = [sample_latents(seed) for seed in range(arguments.num_images)]
        seconds = (time.perf_counter() - start_time) / arguments.num_images
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{name:34s} {seconds:.3f} s per image, {peak_gib:.2f} GiB peak so far", flush=True)
        return seconds, latent_samples

    base_time_s, _ = measure_latency("base model without LoRA")
    with compose_loras(pipe, loras, "composite"):
        batched_time_s, batched_latents = measure_latency(f"composite of {len(loras)}, one forward")
    with tempfile.TemporaryDirectory() as folder:
        names = [f"l{i}" for i in range(len(loras))]
        for name, lora in zip(names, loras, strict=True):
            pipe.load_lora_weights(
                save_lora(lora, Path(folder) / f"{name}.safetensors"), adapter_name=name
            )
        with intercept_denoiser(pipe, _make_sequential_predictor(pipe, names)):
            peft_time_s, peft_latents = measure_latency(f"composite of {len(loras)}, set_adapters")
    max_difference = max(
        float((a - b).abs().max()) for a, b in zip(batched_latents, peft_latents, strict=True)
    )
    print(
        f"ratio {batched_time_s / peft_time_s:.2f} (base alone {base_time_s / peft_time_s:.2f}); "
        f"latents differ by at most {max_difference:.1e}"
    )


def _make_sequential_predictor(
    pipe: DiffusionPipeline, names: list[str]
) -> Callable[[DenoiserCall], Tensor]:
    """Make a denoiser that averages the predictions with each adapter."""

    def predict(call: DenoiserCall) -> Tensor:
        predictions = []
        for name in names:
            pipe.set_adapters([name])
            predictions.append(call())
        return torch.stack(predictions).mean(0)

    return predict


if __name__ == "__main__":
    main()
