"""Subject LoRAs and concept LoRAs of the bundled avatar models, for the benchmarks of composition.

Concept LoRAs are differential LoRAs, fitted to drawn pairs of training identities. Subjects are
those of the test benchmark.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from benchmarks.avatar_evaluator import load_subject_evaluator
from data_builder.avatars.edits import apply_edits
from data_builder.avatars.identity import SPLITS, sample_identity, sample_scene
from data_builder.avatars.rendering import render_portrait
from data_builder.baselines.differential_lora import (
    DifferentialLoraConfig,
    fit_differential_lora,
)
from hyperlora import pretrained
from hyperlora.data.images import stack_images, to_tensor
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.encoders.identity_similarity import scale_identity_cosine
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
"""Values of attributes where a concept is absent."""
NUM_PAIRS = 4
"""Drawn pairs that a concept LoRA is fitted to."""
CONCEPT_STEPS = 120
FitFn = Callable[[DiffusionBase, Tensor, Tensor, str], LoraWeights]
"""Fits a LoRA to images before and after an edit, with the label of a progress bar."""


def fit_differential_concept(
    base: DiffusionBase, before: Tensor, after: Tensor, label: str
) -> LoraWeights:
    """Fit a differential LoRA to pairs of a concept.

    Args:
        base: Base model.
        before: Images without the concept [pairs, 3, h, w].
        after: Images with the concept [pairs, 3, h, w].
        label: Label of the progress bar.

    Returns:
        The LoRA of the concept.
    """
    config = DifferentialLoraConfig(finetune_steps=CONCEPT_STEPS)
    return fit_differential_lora(base, before, after, config, progress_label=label)


class AvatarEvaluation:
    """The bundled base model and classifier, with LoRAs of test subjects.

    Args:
        num_subjects: Number of test subjects.
        num_inference_steps: Denoising steps of an image.

    Attributes:
        evaluator: Evaluator over the test subjects.
        base: Base model.
        classifier: Classifier of attributes and identities.
        subject_loras: LoRA of each subject, from one photo.
        num_inference_steps: Denoising steps of an image.
    """

    def __init__(self, num_subjects: int, num_inference_steps: int) -> None:
        self.evaluator = load_subject_evaluator(pretrained.BENCHMARK_DIR, num_subjects)
        self.base, self.classifier = self.evaluator.base, self.evaluator.classifier
        model = ImageToLora.from_pretrained(pretrained.IMAGE_TO_LORA_DIR, base=self.base)
        with torch.no_grad():
            self.subject_loras = model.forward(self.evaluator.benchmark.photos[:, :1])
        self.num_inference_steps = num_inference_steps

    def fit_concept_lora(
        self, attribute: str, value: str, fit_fn: FitFn = fit_differential_concept
    ) -> LoraWeights:
        """Fit a LoRA to drawn pairs of one attribute value.

        Args:
            attribute: Attribute of the concept.
            value: Value of the concept.
            fit_fn: Method of the fit.

        Returns:
            The LoRA of the concept.
        """
        before, after = self.draw_concept_pairs(attribute, value)
        return fit_fn(self.base, before, after, f"{attribute} {value}")

    def draw_concept_pairs(self, attribute: str, value: str) -> tuple[Tensor, Tensor]:
        """Draw pairs of training identities without and with a concept.

        Args:
            attribute: Attribute of the concept.
            value: Value of the concept.

        Returns:
            Images before and after [pairs, 3, size, size] each.
        """
        size, pairs = self.base.resolution, []
        for seed in SPLITS["train"][:NUM_PAIRS]:
            person = sample_identity(seed)
            scene = replace(sample_scene(seed, 1), hat="none", style="plain")
            if value in (getattr(scene, attribute, None), getattr(person, attribute, None)):
                neutral = {attribute: NEUTRAL_VALUES[attribute]}
                person, scene = apply_edits(person, scene, **neutral)
            portraits = ((person, scene), apply_edits(person, scene, **{attribute: value}))
            pairs.append(
                torch.stack([to_tensor(render_portrait(*pair), size) for pair in portraits])
            )
        before, after = torch.stack(pairs).unbind(1)  # [pairs, 3, size, size]
        return before, after

    def score_identity(
        self, images: Sequence[Image.Image], subject_indices: Sequence[int]
    ) -> Tensor:
        """Compute the identity score of each image as one subject.

        Args:
            images: Images.
            subject_indices: Subject of each image.

        Returns:
            Scores [n] on the benchmark's scale.
        """
        scale = self.evaluator.identity_scale
        embeddings = self.classifier(stack_images(images)).identity  # [n, width]
        real = scale.real_embeddings[list(subject_indices)].mean(1)  # [n, width]
        cosines = (embeddings * real).sum(-1)
        return scale_identity_cosine(cosines, scale.different_cosine, scale.same_cosine)

    def predict_labels(self, images: Sequence[Image.Image], attribute: str) -> list[str]:
        """Predict the class of an attribute in each image.

        Args:
            images: Images.
            attribute: Attribute to classify.

        Returns:
            Class names.
        """
        classes = self.classifier.attributes[attribute]
        logits = self.classifier(stack_images(images)).logits[attribute]  # [n, classes]
        return [classes[i] for i in logits.argmax(-1).tolist()]
