"""The avatars bundle as the benchmarks of composition see it: its people's LoRAs, and LoRAs of single changes.

Concept LoRAs are differential LoRAs, fitted to drawn pairs of training people; people are the benchmark's, never seen.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data_builder.avatars.edits import apply_edits
from data_builder.avatars.identity import SPLITS, sample_identity, sample_scene
from data_builder.avatars.rendering import render_portrait
from data_builder.baselines.differential_lora import fit_differential_lora
from hyperlora import pretrained
from hyperlora.data.images import stack_images, to_tensor
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.subject_evaluator import SubjectEvaluator
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora import ImageToLora

NEUTRAL_VALUES = {
    "glasses": "none",
    "expression": "neutral",
    "eyes": "open",
    "garment": "t-shirt",
    "background": "white",
    "facial_hair": "none",
    "style": "plain",
}


class AvatarEvaluation:
    """The bundle, its benchmark and LoRAs of its people."""

    def __init__(self, num_subjects: int, steps: int) -> None:
        self.base = load_diffusion_base(pretrained.BASE_DIR)
        self.reader = AttributeClassifier.from_pretrained(pretrained.EVALUATOR_DIR)
        self.evaluator = SubjectEvaluator(
            self.base,
            self.reader,
            load_benchmark(pretrained.BENCHMARK_DIR, self.base.resolution, num_subjects),
        )
        model = ImageToLora.from_pretrained(pretrained.IMAGE_TO_LORA_DIR, base=self.base)
        with torch.no_grad():
            self.subject_loras = model.forward(self.evaluator.benchmark.photos[:, :1])
        self.steps = steps

    def fit_concept_lora(
        self,
        attribute: str,
        value: str,
        num_pairs: int = 4,
        steps: int = 120,
        fit_method: Callable[..., Any] = fit_differential_lora,
    ) -> LoraWeights:
        """A LoRA of one attribute's change, fitted to drawn pairs of training people."""
        before, after = self.draw_concept_pairs(attribute, value, num_pairs)
        return fit_method(self.base, before, after, steps=steps, label=f"{attribute} {value}")

    def draw_concept_pairs(
        self, attribute: str, value: str, num_pairs: int = 4
    ) -> tuple[Tensor, Tensor]:
        """Drawn pairs of training people, before and after, [pairs, 3, size, size] each."""
        pair_pixels = []
        for seed in SPLITS["train"][:num_pairs]:
            person, avatar_scene = (
                sample_identity(seed),
                replace(sample_scene(seed, 1), hat="none", style="plain"),
            )
            if (
                getattr(avatar_scene, attribute, None) == value
                or getattr(person, attribute, None) == value
            ):
                person, avatar_scene = apply_edits(
                    person, avatar_scene, **{attribute: NEUTRAL_VALUES[attribute]}
                )
            after = apply_edits(person, avatar_scene, **{attribute: value})
            size = self.base.resolution
            pair_pixels.append(
                torch.stack(
                    [
                        to_tensor(render_portrait(*both), size)
                        for both in ((person, avatar_scene), after)
                    ]
                )
            )
        before, after_ = torch.stack(pair_pixels).unbind(1)
        return before, after_

    def score_identity(
        self, images: Sequence[Image.Image], subject_indices: Sequence[int]
    ) -> Tensor:
        """Identity score of each picture as each person, on the benchmark's scale."""
        embeddings = self.reader(stack_images(images)).identity
        real = self.evaluator.identity_scale.real_embeddings[list(subject_indices)].mean(1)
        scale = self.evaluator.identity_scale
        return ((embeddings * real).sum(-1) - scale.different_cosine) / (
            scale.same_cosine - scale.different_cosine
        )

    def predict_labels(self, images: Sequence[Image.Image], attribute: str) -> list[str]:
        classes = self.reader.attributes[attribute]
        return [
            classes[i]
            for i in self.reader(stack_images(images)).logits[attribute].argmax(-1).tolist()
        ]
