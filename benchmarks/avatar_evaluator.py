"""The subject evaluator that most benchmarks on the avatar base share."""

import os

from hyperlora import pretrained
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.subject_evaluator import SubjectEvaluator


def load_subject_evaluator(
    benchmark_dir: str | os.PathLike[str],
    num_subjects: int | None = None,
    num_inference_steps: int = 20,
) -> SubjectEvaluator:
    """Load the evaluator of a subject benchmark with the bundled base model and classifier.

    Args:
        benchmark_dir: Folder of the benchmark.
        num_subjects: Number of subjects; None: all.
        num_inference_steps: Denoising steps of an image.

    Returns:
        The evaluator.
    """
    base = load_diffusion_base(pretrained.BASE_DIR)
    return SubjectEvaluator(
        base,
        AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR),
        load_benchmark(benchmark_dir, base.resolution, num_subjects),
        num_inference_steps,
    )
