"""LoRAs compared as vectors, and codecs and models on held-out rows of a build."""

from dataclasses import replace
from typing import Any

import torch

from benchmarks.ablations.codec_heldout import format_table, make_held_out_evaluation
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.evaluation.benchmark import Benchmark, Prompt
from hyperlora.evaluation.metrics import compute_max_train_cosine, compute_sample_diversity
from hyperlora.evaluation.subject_evaluator import SubjectEvaluator
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.merge import compare_deltas, compute_relative_error
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.config import LoraSampling
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.lora_codec import LoraCodec
from tests.benchmarks.conftest import Builds

LAYOUT = LoraLayout((TargetModule("unet.a", 24, 40), TargetModule("unet.b", 6, 8)), 2, "tiny")


def test_compare_deltas_equals_dense_computation() -> None:
    first, second = (LoraWeights.unflatten(LAYOUT, torch.randn(3, LAYOUT.numel)) for _ in range(2))
    error, cosine = compare_deltas(first, second)
    assert abs(float(error[1]) - compute_relative_error(second[1], first[1])) < 1e-4
    flat = [
        torch.cat([d.flatten(1) for d in lora.get_delta_weights()], 1) for lora in (first, second)
    ]
    torch.testing.assert_close(cosine, torch.cosine_similarity(*flat, dim=-1), rtol=1e-4, atol=1e-5)


def test_max_train_cosine_and_diversity_find_copies() -> None:
    training, others = torch.randn(20, 50), torch.randn(5, 50)
    cosines = compute_max_train_cosine(torch.cat([training[:3] * 2, others]), training)
    assert cosines[:3].allclose(torch.ones(3)) and cosines[3:].max() < 0.9
    assert abs(compute_sample_diversity(training[:4, None].expand(-1, 3, -1))) < 1e-5
    assert compute_sample_diversity(training.view(4, 5, 50)) > 0.8


def test_held_out_evaluation_scores_codecs_and_models(bundle: Any, builds: Builds) -> None:
    base = load_diffusion_base(bundle.base)
    classifier = AttributeClassifier.from_pretrained(bundle.evaluator)

    def make_evaluator(benchmark: Benchmark) -> SubjectEvaluator:
        return SubjectEvaluator(base, classifier, benchmark, num_inference_steps=1)

    prompts = [Prompt("a portrait of sks person", {"expression": "sad"})]
    evaluation = make_held_out_evaluation(
        builds.train, builds.others, make_evaluator, prompts, base.resolution, 3
    )
    assert evaluation.evaluator.benchmark.names == (
        "person-1000000",
        "person-1000001",
        "person-1000002",
    )
    original = evaluation.evaluate_original()
    data = LoraDataset(builds.train, "train")
    codec = LoraCodec.fit_pca(data, 1, 3)
    train_evaluation = make_held_out_evaluation(
        builds.train, builds.train, make_evaluator, prompts, base.resolution, 4, "train"
    )
    reconstructed = train_evaluation.evaluate_codec(
        "codec", codec, train_evaluation.evaluate_original()
    )  # four rows lie in three directions
    assert reconstructed.delta_error is not None and reconstructed.delta_error < 0.02
    assert reconstructed.max_train_cosine is not None and reconstructed.max_train_cosine > 0.99
    decoded = evaluation.evaluate_codec("codec", codec, original)
    assert (
        decoded.max_train_cosine is not None
        and decoded.delta_error is not None
        and decoded.delta_error > reconstructed.delta_error
    )
    assert decoded.compression == data.layout.numel / 3
    assert (
        decoded.identity_retention == decoded.scores.identity.mean / original.scores.identity.mean
    )
    sampled = evaluation.evaluate_sampler(
        "one pass", ImageToLora.from_pretrained(str(bundle.model)), original, LoraSampling(), 2
    )
    assert (
        sampled.sample_diversity is not None and abs(sampled.sample_diversity) < 1e-4
    )  # the model is deterministic
    lines = list(format_table([original, decoded, replace(sampled, max_train_cosine=None)]))
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
