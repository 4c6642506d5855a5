"""LoRAs fine-tuned on one photo per benchmark subject (DreamBooth), for ``hyperlora demo``."""

from pathlib import Path

import torch

from hyperlora import pretrained
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.subject_evaluator import SubjectEvaluator
from hyperlora.evaluation.subject_suite import FineTuneBaseline, fit_subject_loras
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora
from hyperlora.pipelines.image_to_lora import ImageToLora


def fit_baseline_loras(output_dir: Path, num_subjects: int, settings: FineTuneBaseline) -> None:
    """Write ``NAME.safetensors`` (fp16) for the first benchmark subjects, with the layout of the
    bundled model.

    Args:
        output_dir: Folder to write.
        num_subjects: Number of subjects.
        settings: Settings of the fine-tuning.
    """
    base = load_diffusion_base(pretrained.BASE_DIR)
    model = ImageToLora.from_pretrained(pretrained.IMAGE_TO_LORA_DIR, base=base)
    benchmark = load_benchmark(pretrained.BENCHMARK_DIR, base.resolution, num_subjects)
    evaluator = SubjectEvaluator(
        base, AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR), benchmark
    )
    loras_by_step = fit_subject_loras(evaluator, model, benchmark.photos[:, :1], settings)
    loras = loras_by_step[settings.num_steps]
    metadata = LoraMetadata(
        architecture=base.architecture, trigger_phrase=model.card.trigger_phrase
    )
    for i, name in enumerate(benchmark.names):
        save_lora(
            loras[i], output_dir / f"{name}.safetensors", metadata=metadata, dtype=torch.float16
        )
