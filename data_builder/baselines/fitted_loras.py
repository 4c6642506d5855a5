"""LoRAs fitted to one photo each of a benchmark's people (DreamBooth); ``hyperlora demo`` shows them beside its own."""

from pathlib import Path

import torch

from hyperlora import pretrained
from hyperlora.diffusion.diffusion_base import load_base
from hyperlora.encoders.attribute_classifier import Reader
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.subject_evaluator import Judge
from hyperlora.evaluation.subject_suite import FitSettings, fitted_loras
from hyperlora.lora.io.metadata import LoraHeader
from hyperlora.lora.io.save import save_lora
from hyperlora.pipelines.image_to_lora import ImageToLora


def fit_benchmark(out: Path, people: int, settings: FitSettings) -> None:
    """``out/NAME.safetensors`` (fp16) for the first ``people``, of the bundled model's sites and rank."""
    base = load_base(pretrained.BASE)
    model = ImageToLora.from_pretrained(pretrained.MODEL, base=base)
    benchmark = load_benchmark(pretrained.BENCHMARK, base.resolution, people)
    judge = Judge(base, Reader.from_pretrained(pretrained.EVALUATOR), benchmark)
    loras = fitted_loras(judge, model, benchmark.photos[:, :1], settings)[settings.steps]
    header = LoraHeader(architecture=base.architecture, trigger_phrase=str(model.card.get("trigger_phrase", "")))
    for i, name in enumerate(benchmark.names):
        save_lora(loras[i], out / f"{name}.safetensors", header=header, dtype=torch.float16)
