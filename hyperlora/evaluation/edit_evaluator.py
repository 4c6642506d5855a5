"""Evaluation of edits: apply them to images of unseen subjects and compare with the targets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hyperlora.data.images import stack_images
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.image_editing import edit_images
from hyperlora.encoders.attribute_classifier import AttributeClassifier, predict_in_batches
from hyperlora.evaluation.edit_benchmark import Edit, EditBenchmark
from hyperlora.evaluation.metrics import Score
from hyperlora.lora.weights import LoraWeights
from hyperlora.progress import track

CHANGE_THRESHOLD: Final = 0.04
"""Least change of a color channel, of 1, that makes a pixel part of the edited region."""
PromptFn = Callable[[Edit], str]
"""Edit prompt of an edit."""
PROGRESS_THRESHOLD: Final = 0.7
"""Least ``edit_progress`` of a correct edit where attributes do not describe the whole edit."""
METRICS: Final = {
    "accuracy": "fraction of edits whose attributes are recognized as asked; where attributes do "
    "not describe the whole edit, edit_progress must also be at least 0.7",
    "preservation": "fraction of other attributes recognized as in the target",
    "edit_progress": "fraction of the way from input to target inside the edited region (L1)",
    "background_l1": "mean L1 error against the target outside the edited region, of 1",
    "psnr": "PSNR against the target in dB",
    "directional_similarity": "cosine of the feature changes of example pair and image",
    "leakage": "cosine of features with the example output, minus that of the target",
}
"""Metrics of an edit with their definitions."""


@dataclass(frozen=True)
class EditFeatures:
    """Pooled features of the evaluator [images, width].

    Attributes:
        targets: Of the targets.
        inputs: Of the input images.
        example_inputs: Of the first example pair before the edit.
        example_outputs: Of the first example pair after the edit.
    """

    targets: Tensor
    inputs: Tensor
    example_inputs: Tensor
    example_outputs: Tensor


@dataclass(frozen=True)
class EditResult:
    """One row of the table.

    Attributes:
        name: Name of the row.
        values: Value of each metric per edit [edits], the mean over its images.
        edits: Edits of the benchmark.
        images: Edited images [n, 3, h, w] in [0, 1].
        seconds: Time per LoRA.
    """

    name: str
    values: Mapping[str, Tensor]
    edits: Sequence[Edit] = field(repr=False)
    images: Tensor = field(repr=False)
    seconds: float | None = None

    def compute_score(self, metric: str, group: str | None = None) -> Score:
        """Compute the score over the edits of a group.

        Args:
            metric: One of ``METRICS``.
            group: Group of edits; None: all edits.

        Returns:
            Mean and standard error over edits.
        """
        in_group = [group is None or edit.group == group for edit in self.edits]
        return Score.from_samples(self.values[metric][torch.tensor(in_group)])

    def compute_mean_by_kind(self, metric: str) -> dict[str, float]:
        """Compute the mean of a metric by kind of edit."""
        values_by_kind: dict[str, list[float]] = {}
        for edit, value in zip(self.edits, self.values[metric].tolist(), strict=True):
            values_by_kind.setdefault(edit.kind, []).append(value)
        return {kind: sum(values) / len(values) for kind, values in values_by_kind.items()}


@dataclass(frozen=True)
class EditEvaluator:
    """A benchmark, the edit base that applies edits, and the classifier that scores them.

    Attributes:
        base: InstructPix2Pix base model.
        classifier: Classifier of attributes.
        benchmark: Edits with test pairs.
        num_inference_steps: Denoising steps of an image.
        batch_size: Images per batch.
    """

    base: DiffusionBase
    classifier: AttributeClassifier
    benchmark: EditBenchmark
    num_inference_steps: int = 20
    batch_size: int = 32

    @cached_property
    def image_edits(self) -> list[Edit]:
        """Edit of each test image, in the order of all tensors here."""
        return [edit for edit in self.benchmark.edits for _ in edit.test_pairs]

    @cached_property
    def inputs(self) -> Tensor:
        """Images to edit [n, 3, h, w]."""
        return torch.cat([edit.test_pairs[:, 0] for edit in self.benchmark.edits])

    @cached_property
    def targets(self) -> Tensor:
        """Exact results [n, 3, h, w]."""
        return torch.cat([edit.test_pairs[:, 1] for edit in self.benchmark.edits])

    @cached_property
    def vae_round_trip(self) -> Tensor:
        """Targets after encoding and decoding by the VAE: the ceiling of any edit."""
        return self.reconstruct_images(self.targets)

    @cached_property
    def target_labels(self) -> dict[str, list[int]]:
        """Class index of each target by attribute, as the classifier predicts it."""
        return self._predict_labels(self.targets)

    @cached_property
    def features(self) -> EditFeatures:
        """The evaluator's features of targets, inputs and first example pairs."""
        example_pairs = torch.stack([edit.example_pairs[0] for edit in self.image_edits])
        return EditFeatures(
            self._encode_images(self.targets),
            self._encode_images(self.inputs),
            self._encode_images(example_pairs[:, 0]),
            self._encode_images(example_pairs[:, 1]),
        )

    @torch.no_grad()
    def reconstruct_images(self, images: Tensor) -> Tensor:
        """Encode and decode images [n, 3, h, w] with the VAE; the result is on their device."""
        batches = images.split(self.batch_size)
        decoded = [self.base.decode_latents(self.base.encode_images(part)) for part in batches]
        return torch.cat([part.to(images) for part in decoded])

    def evaluate(
        self,
        name: str,
        loras: LoraWeights | None,
        *,
        prompt_fn: PromptFn | None = None,
        guidance_scale: float = 1.0,
        seconds: float | None = None,
    ) -> EditResult:
        """Edit every input, with the same seeds for all rows, and score the images.

        Args:
            name: Name of the row.
            loras: One LoRA per edit, one for all (no batch axis), or None for the edit base.
            prompt_fn: Edit prompt of each edit; None: the empty prompt.
            guidance_scale: Guidance by the prompt; 1: none.
            seconds: Time per LoRA, for the table.

        Returns:
            A row of the table.
        """
        return self.score_images(
            name, self.render_edits(name, loras, self.inputs, prompt_fn, guidance_scale), seconds
        )

    def render_edits(
        self,
        name: str,
        loras: LoraWeights | None,
        images: Tensor,
        prompt_fn: PromptFn | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """Apply edits to images.

        Args:
            name: Label of the progress bar.
            loras: One LoRA per edit, one for all (no batch axis), or None for the edit base.
            images: Images [n, 3, h, w], one per entry of ``image_edits``.
            prompt_fn: Edit prompt of each edit; None: the empty prompt.
            guidance_scale: Guidance by the prompt; 1: none.

        Returns:
            Edited images [n, 3, h, w].
        """
        images_per_edit = torch.tensor([len(edit.test_pairs) for edit in self.benchmark.edits])
        edit_index = torch.arange(len(images_per_edit)).repeat_interleave(images_per_edit)
        edited_images: list[Image.Image] = []
        chunks = torch.arange(len(images)).split(self.batch_size)
        for chunk in track(list(chunks), name, "images", len(images), self.batch_size):
            lora = loras[edit_index[chunk]] if loras is not None and loras.batch_shape else loras
            instructions = [
                prompt_fn(self.image_edits[i]) if prompt_fn else "" for i in chunk.tolist()
            ]
            edited_images += edit_images(
                self.base,
                images[chunk],
                lora,
                seeds=[1000 + i for i in chunk.tolist()],
                instructions=instructions,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=guidance_scale,
            )
        return stack_images(edited_images)

    def score_images(self, name: str, images: Tensor, seconds: float | None = None) -> EditResult:
        """Score edited images against the targets.

        Args:
            name: Name of the row.
            images: Edited images [n, 3, h, w] in the order of ``image_edits``.
            seconds: Time per LoRA, for the table.

        Returns:
            A row of the table.
        """
        inputs, targets, features = self.inputs, self.targets, self.features
        # edited region [n, 1, h, w]: pixels whose color changes between input and target
        mask = ((targets - inputs).abs().amax(1, keepdim=True) > CHANGE_THRESHOLD).float()
        errors = (images - targets).abs()  # [n, 3, h, w]
        initial_error = _compute_masked_mean((inputs - targets).abs(), mask).clamp(min=1e-6)
        progress = 1 - _compute_masked_mean(errors, mask) / initial_error  # [n]
        mean_squared_error = (images - targets).square().mean((1, 2, 3)).clamp(min=1e-8)
        image_features = self._encode_images(images)  # [n, width]
        example_change = features.example_outputs - features.example_inputs
        accuracy, preservation = self._score_attributes(images, progress)
        leakage = F.cosine_similarity(image_features, features.example_outputs)
        target_leakage = F.cosine_similarity(features.targets, features.example_outputs)
        values = {
            "accuracy": accuracy,
            "preservation": preservation,
            "edit_progress": progress,
            "background_l1": _compute_masked_mean(errors, 1 - mask),
            "psnr": -10 * mean_squared_error.log10(),
            "directional_similarity": F.cosine_similarity(
                example_change, image_features - features.inputs
            ),
            "leakage": leakage - target_leakage,
        }
        images_per_edit = [len(edit.test_pairs) for edit in self.benchmark.edits]
        per_edit = {
            name: torch.stack([part.mean() for part in value.split(images_per_edit)])
            for name, value in values.items()
        }
        return EditResult(name, per_edit, self.benchmark.edits, images, seconds)

    def _score_attributes(self, images: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each edit is correct [n], and the fraction of other attributes as in the target
        [n].
        """
        predicted, target = self._predict_labels(images), self.target_labels
        classes = self.classifier.attributes
        is_correct, preservation = list[bool](), list[float]()
        for i, edit in enumerate(self.image_edits):
            all_match = all(
                predicted[name][i] == classes[name].index(value)
                for name, value in edit.truth.items()
            )
            has_progress = float(progress[i]) >= PROGRESS_THRESHOLD
            is_correct.append(all_match and (edit.has_complete_truth or has_progress))
            unedited = [name for name in classes if name not in edit.truth]
            num_preserved = sum(predicted[name][i] == target[name][i] for name in unedited)
            preservation.append(num_preserved / len(unedited) if unedited else 1.0)
        return torch.tensor(is_correct).float(), torch.tensor(preservation)

    def _predict_labels(self, images: Tensor) -> dict[str, list[int]]:
        prediction = predict_in_batches(self.classifier, images)
        return {name: logits.argmax(-1).tolist() for name, logits in prediction.logits.items()}

    @torch.no_grad()
    def _encode_images(self, images: Tensor) -> Tensor:
        encode = self.classifier.encoder.compute_pooled_features
        return torch.cat([encode(part).to(images.device) for part in images.split(64)])


def _compute_masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Mean of [n, 3, h, w] over colors and the pixels of ``mask`` [n, 1, h, w]; 0 for an empty
    mask.
    """
    return (error.mean(1, keepdim=True) * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1)
