"""Evaluation of subject LoRAs: generate images for the benchmark's prompts and score them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from PIL import Image

from hyperlora.data.images import stack_images
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.encoders.attribute_classifier import AttributeClassifier, predict_in_batches
from hyperlora.errors import InvalidArgumentError
from hyperlora.evaluation.benchmark import Benchmark
from hyperlora.evaluation.metrics import (
    IdentityScale,
    Score,
    compute_attribute_accuracy,
    compute_prompt_accuracy,
)
from hyperlora.lora.weights import LoraWeights
from hyperlora.progress import track

ResultRole = Literal["reference", "variant", "control"]
"""``variant`` results are compared with the preceding ``reference``, subject by subject."""


@dataclass(frozen=True)
class SubjectResult:
    """One row of the table.

    Attributes:
        name: Name of the row.
        identity: Identity score: 0 for another subject, 1 for another real photo of the subject.
        prompt_accuracy: Fraction of prompted attributes that the evaluator recognizes; None where
            prompts have no truth.
        seconds: Time per LoRA.
        images: Generated images [subject][prompt].
        attribute_accuracy: Accuracy of each prompted attribute alone.
        role: Role of the row in the comparison of the report.
    """

    name: str
    identity: Score
    prompt_accuracy: Score | None
    seconds: float | None = None
    images: Sequence[Sequence[Image.Image]] = field(default=(), repr=False)
    attribute_accuracy: Mapping[str, float] = field(default_factory=dict)
    role: ResultRole = "control"


@dataclass(frozen=True)
class SubjectEvaluator:
    """A benchmark, the base model that generates images, and the classifier that scores them.

    Attributes:
        base: Base model of the LoRAs.
        classifier: Classifier of attributes and identities.
        benchmark: Photos and prompts.
        num_inference_steps: Denoising steps of an image.
        guidance_scale: Classifier-free guidance of an image.
        batch_size: Images per batch.

    Raises:
        InvalidArgumentError: If the truth of a prompt is unknown to the classifier.
    """

    base: DiffusionBase
    classifier: AttributeClassifier
    benchmark: Benchmark
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Check that the classifier knows the truth of every prompt."""
        classes = self.classifier.attributes
        for prompt in self.benchmark.prompts:
            for attribute, value in prompt.truth.items():
                if value in classes.get(attribute, ()):
                    continue
                raise InvalidArgumentError(
                    f"the truth {attribute} = {value!r} of prompt {prompt.prompt!r} is unknown to "
                    "the evaluator: correct prompts.json or give another --evaluator"
                )

    @cached_property
    def identity_scale(self) -> IdentityScale:
        """Scale of the identity score, measured on the benchmark's comparison photos."""
        comparison_photos = self.benchmark.comparison_photos
        prediction = predict_in_batches(self.classifier, comparison_photos.flatten(0, 1))
        return IdentityScale.from_embeddings(
            prediction.identity.unflatten(0, comparison_photos.shape[:2])
        )

    def evaluate(
        self,
        name: str,
        loras: LoraWeights | None,
        seconds: float | None = None,
        role: ResultRole = "control",
    ) -> SubjectResult:
        """Generate every prompt for every subject, with the same seeds for all LoRAs, and score the
        images.

        Args:
            name: Name of the row.
            loras: One LoRA per subject, one for all (no batch axis), or None for the base model.
            seconds: Time per LoRA, for the table.
            role: Role of the row in the comparison of the report.

        Returns:
            A row of the table.
        """
        num_subjects, prompts = len(self.benchmark.names), self.benchmark.prompts
        jobs = [(s, p) for s in range(num_subjects) for p in range(len(prompts))]
        images: list[Image.Image] = []
        chunks = [jobs[i : i + self.batch_size] for i in range(0, len(jobs), self.batch_size)]
        for chunk in track(chunks, name, "images", len(jobs), self.batch_size):
            lora = loras
            if loras is not None and loras.batch_shape:
                lora = loras[[subject for subject, _ in chunk]]
            images += generate_images(
                self.base,
                [prompts[p].prompt for _, p in chunk],
                lora,
                seeds=[1000 + len(prompts) * s + p for s, p in chunk],
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
            )
        return replace(self.score_images(name, images, seconds), role=role)

    def score_images(
        self, name: str, images: Sequence[Image.Image], seconds: float | None = None
    ) -> SubjectResult:
        """Score images.

        Args:
            name: Name of the row.
            images: Images in subject-major order, one per subject and prompt.
            seconds: Time per LoRA, for the table.

        Returns:
            A row of the table.
        """
        num_subjects, num_prompts = len(self.benchmark.names), len(self.benchmark.prompts)
        prediction = predict_in_batches(self.classifier, stack_images(images))
        embeddings = prediction.identity.unflatten(0, (num_subjects, num_prompts))
        identity = self.identity_scale.compute_score(embeddings)  # [subjects]
        prompt_accuracy, attribute_accuracy = None, {}
        if self.benchmark.has_truth:
            truths = [prompt.truth for prompt in self.benchmark.prompts] * num_subjects
            image_accuracy = compute_prompt_accuracy(self.classifier, prediction, truths)
            subject_accuracy = image_accuracy.view(num_subjects, num_prompts).mean(1)  # [subjects]
            prompt_accuracy = Score.from_samples(subject_accuracy)
            attribute_accuracy = compute_attribute_accuracy(self.classifier, prediction, truths)
        grid = [list(images[i * num_prompts : (i + 1) * num_prompts]) for i in range(num_subjects)]
        return SubjectResult(
            name, Score.from_samples(identity), prompt_accuracy, seconds, grid, attribute_accuracy
        )
