"""LoRAs fitted to one photo each of a benchmark's people (DreamBooth); ``hyperlora demo`` shows them beside its own."""

from pathlib import Path

import torch

from hyperlora import bundle
from hyperlora.encoders import Reader
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.personalisation import Judge
from hyperlora.evaluation.table import FitSettings, fitted_loras
from hyperlora.formats import LoraHeader, save_lora
from hyperlora.pipelines import ImageToLora, load_base


def fit_benchmark(out: Path, people: int, settings: FitSettings) -> None:
    """``out/NAME.safetensors`` (fp16) for the first ``people``, of the bundled model's sites and rank."""
    base = load_base(bundle.BASE)
    model = ImageToLora.from_pretrained(bundle.MODEL, base=base)
    benchmark = load_benchmark(bundle.BENCHMARK, base.resolution, people)
    judge = Judge(base, Reader.from_pretrained(bundle.EVALUATOR), benchmark)
    loras = fitted_loras(judge, model, benchmark.photos[:, :1], settings)[settings.steps]
    header = LoraHeader(architecture=base.architecture, trigger_phrase=str(model.card.get("trigger_phrase", "")))
    for i, name in enumerate(benchmark.names):
        save_lora(loras[i], out / f"{name}.safetensors", header=header, dtype=torch.float16)
