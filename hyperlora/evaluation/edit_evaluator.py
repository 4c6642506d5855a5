"""Run edits over pictures of unseen people and score what comes out against the drawn answers."""

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
"""A pixel with a colour that changes by more than this, of 1, belongs to the edited region."""
PromptFn = Callable[[Edit], str]
"""The words of an edit that the base is shown."""
PROGRESS_THRESHOLD: Final = 0.7
"""An edit of which something is named by no attribute counts as made if so much of the way from B to the answer was
gone as well."""
METRICS: Final = {
    "accuracy": "what changes is read as asked (where attributes do not name all that changes: and made at least 0.7)",
    "preservation": "all else is read as in the drawn answer",
    "made": "how much of the way from B to the answer was gone, inside the edited region",
    "outside": "mean error against the answer outside that region, of 1",
    "psnr": "dB against the answer",
    "direction": "cosine of the features' change shown and made (Visual CLIP with the evaluator's features)",
    "leakage": "how much more the result looks like A' than the answer does, as a cosine",
}


@dataclass(frozen=True)
class EditResult:
    """One line of the table: each of ``METRICS`` per edit (the mean of its pictures), [edits] each; ``images``
    [n, 3, h, w] are what came out."""

    name: str
    values: Mapping[str, Tensor]
    edits: Sequence[Edit] = field(repr=False)
    images: Tensor = field(repr=False)
    seconds: float | None = None

    def compute_score(self, metric: str, group: str | None = None) -> Score:
        """Over the edits of a group, or over all."""
        in_group = [group is None or edit.group == group for edit in self.edits]
        return Score.from_samples(self.values[metric][torch.tensor(in_group)])

    def compute_mean_by_kind(self, metric: str) -> dict[str, float]:
        """The mean of each kind of edit."""
        values_by_kind: dict[str, list[float]] = {}
        for edit, value in zip(self.edits, self.values[metric].tolist(), strict=True):
            values_by_kind.setdefault(edit.kind, []).append(value)
        return {kind: sum(values) / len(values) for kind, values in values_by_kind.items()}


@dataclass(frozen=True)
class EditEvaluator:
    """A benchmark, the edit base and the evaluator that scores."""

    base: DiffusionBase
    classifier: AttributeClassifier
    benchmark: EditBenchmark
    num_inference_steps: int = 20
    batch_size: int = 32

    @cached_property
    def image_edits(self) -> list[Edit]:
        """The edit of each picture to edit, in the order of all tensors here."""
        return [edit for edit in self.benchmark.edits for _ in edit.test_pairs]

    @cached_property
    def inputs(self) -> Tensor:
        return torch.cat([edit.test_pairs[:, 0] for edit in self.benchmark.edits])

    @cached_property
    def targets(self) -> Tensor:
        return torch.cat([edit.test_pairs[:, 1] for edit in self.benchmark.edits])

    @cached_property
    def vae_round_trip(self) -> Tensor:
        """The answers through the autoencoder and back: what no edit can be better than."""
        return self.reconstruct_images(self.targets)

    @cached_property
    def target_labels(self) -> dict[str, list[int]]:
        """What the evaluator reads in the answers, by attribute."""
        return self._predict_labels(self.targets)

    @cached_property
    def features(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The evaluator's, of the answers, the pictures to edit, and of the first pair shown before and after."""
        example_pairs = torch.stack([edit.example_pairs[0] for edit in self.image_edits])
        target_features, input_features, example_before, example_after = map(
            self._encode_images,
            (self.targets, self.inputs, example_pairs[:, 0], example_pairs[:, 1]),
        )
        return target_features, input_features, example_before, example_after

    @torch.no_grad()
    def reconstruct_images(self, images: Tensor) -> Tensor:
        batches = images.split(self.batch_size)
        return torch.cat(
            [self.base.decode_latents(self.base.encode_images(part)) for part in batches]
        )

    def evaluate(
        self,
        name: str,
        loras: LoraWeights | None,
        *,
        prompt_fn: PromptFn | None = None,
        guidance_scale: float = 1.0,
        seconds: float | None = None,
    ) -> EditResult:
        """Edit every picture (the same seeds in every row) and score; ``measure_lora_throughput`` has one LoRA per edit of the benchmark,
        or no batch axis (one for all), or is None; ``prompt_fn`` says what the base is told, if anything."""
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
        """[n, 3, h, w]: ``images`` (one per entry of ``image_edits``) after the edits."""
        images_per_edit = torch.tensor([len(edit.test_pairs) for edit in self.benchmark.edits])
        edit_index = torch.arange(len(images_per_edit)).repeat_interleave(images_per_edit)
        edited_images: list[Image.Image] = []
        chunks = torch.arange(len(images)).split(self.batch_size)
        for chunk in track(list(chunks), name, "pictures", len(images), self.batch_size):
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
        """``images`` [n, 3, h, w] in the order of ``image_edits``."""
        inputs, targets = self.inputs, self.targets
        mask = ((targets - inputs).abs().amax(1, keepdim=True) > CHANGE_THRESHOLD).float()
        initial_error = _compute_masked_mean((inputs - targets).abs(), mask).clamp(min=1e-6)
        progress = 1 - _compute_masked_mean((images - targets).abs(), mask) / initial_error
        image_features = self._encode_images(images)
        target_features, input_features, example_before, example_after = self.features
        accuracy, preservation = self._score_attributes(images, progress)
        values = {
            "accuracy": accuracy,
            "preservation": preservation,
            "made": progress,
            "outside": _compute_masked_mean((images - targets).abs(), 1 - mask),
            "psnr": -10 * (images - targets).square().mean((1, 2, 3)).clamp(min=1e-8).log10(),
            "direction": F.cosine_similarity(
                example_after - example_before, image_features - input_features
            ),
            "leakage": F.cosine_similarity(image_features, example_after)
            - F.cosine_similarity(target_features, example_after),
        }
        images_per_edit = [len(edit.test_pairs) for edit in self.benchmark.edits]
        per_edit = {
            k: torch.stack([part.mean() for part in v.split(images_per_edit)])
            for k, v in values.items()
        }
        return EditResult(name, per_edit, self.benchmark.edits, images, seconds)

    def _score_attributes(self, images: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        """Per picture: whether the edit was made, and the fraction of other attributes read as in the answer."""
        predicted_labels, target_labels, classes = (
            self._predict_labels(images),
            self.target_labels,
            self.classifier.attributes,
        )
        correct, preservation = [], []
        for i, edit in enumerate(self.image_edits):
            matches = [predicted_labels[k][i] == classes[k].index(v) for k, v in edit.truth.items()]
            correct.append(
                all(matches)
                and (edit.has_complete_truth or float(progress[i]) >= PROGRESS_THRESHOLD)
            )
            unedited_attributes = [k for k in classes if k not in edit.truth]
            preservation.append(
                sum(predicted_labels[k][i] == target_labels[k][i] for k in unedited_attributes)
                / len(unedited_attributes)
            )
        return torch.tensor(correct).float(), torch.tensor(preservation)

    def _predict_labels(self, images: Tensor) -> dict[str, list[int]]:
        prediction = predict_in_batches(self.classifier, images)
        return {name: logits.argmax(-1).tolist() for name, logits in prediction.logits.items()}

    @torch.no_grad()
    def _encode_images(self, images: Tensor) -> Tensor:
        return torch.cat(
            [self.classifier.encoder.compute_pooled_features(part) for part in images.split(64)]
        )


def _compute_masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Mean over colours and the places of ``mask`` [n, 1, h, w], per picture; 0 for an empty one."""
    return (error.mean(1, keepdim=True) * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1)
