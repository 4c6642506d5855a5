"""``ChunkTrainer`` fits the chunks of a plan on one frozen base model, K subjects at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import torch
from torch import Generator, Tensor

from data_builder.build.plan import (
    PLAN_KEY,
    SKIPPED_KEY,
    Plan,
    PlannedLora,
    Recipe,
    replace_invalid_utf8,
)
from data_builder.build.subject_data import SubjectData, load_subject, make_class_examples
from data_builder.sources.sources import source_from_dict
from hyperlora import pretrained
from hyperlora.compute import ComputeConfig
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.data.lora_shards import LoraRecord, serialize_shard
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.errors import InvalidImageError
from hyperlora.finetuning.config import FineTuneConfig
from hyperlora.finetuning.examples import TrainingExamples, ValidationProbe
from hyperlora.finetuning.trainer import FineTuneResult, fine_tune_loras
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.parametrizations import LidbParametrization, make_parametrization
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora import ImageToLora

if TYPE_CHECKING:
    from diffusers import ModelMixin

MEAN_SAMPLE_SIZE: Final = 128
"""LoRAs, evenly spread over the dataset, whose mean is the start for ``init="mean"``."""


class ChunkTrainer:
    """Fits chunks of a plan. A chunk is the same whenever and wherever it is built on like
    machines.

    Args:
        plan: Plan of the build.
        base: Base model of the recipe, from ``load_recipe_base``.
        class_latents: Latents of class images [n, c, h, w], if the recipe has prior preservation.

    Raises:
        LayoutMismatchError: If the network or dataset to start from is for another base model.
    """

    def __init__(
        self, plan: Plan, base: DiffusionBase, class_latents: Tensor | None = None
    ) -> None:
        self.plan, self.base, recipe = plan, base, plan.recipe
        self.source = source_from_dict(plan.source)
        self.network = _load_init_network(recipe, base)
        self.layout = _make_layout(recipe, base, self.network)
        self.parametrization = make_parametrization(
            recipe.parametrization.replace("locon", "lora"), self.layout, recipe.inner_rank
        )
        if isinstance(self.parametrization, LidbParametrization):
            self.parametrization.lidb.to(base.device)
        self.init_mean = _compute_init_mean(recipe, self.layout)
        self.prior_examples = (
            None if class_latents is None else make_class_examples(base, recipe, class_latents)
        )
        if recipe.gradient_checkpointing:
            denoiser = cast("ModelMixin", base.denoiser)
            denoiser.enable_gradient_checkpointing()

    def build_chunk(self, number: int) -> bytes:
        """Fit the LoRAs of a chunk.

        Subjects whose photos cannot be read any more are listed in the metadata of the shard.

        Args:
            number: Number of the chunk.

        Returns:
            Bytes of the shard.
        """
        recipe = self.plan.recipe
        rows, subject_data, skipped = list[PlannedLora](), list[SubjectData](), list[str]()
        for row in self.plan.get_chunk(number):
            try:
                subject_data.append(load_subject(row, self.source, self.base, recipe))
                rows.append(row)
            except InvalidImageError as error:
                skipped.append(replace_invalid_utf8(f"{row.subject}: {error}"))
        row_values = torch.zeros(0, self.layout.numel, dtype=getattr(torch, recipe.storage_dtype))
        records: list[LoraRecord] = []
        if rows:
            result = self.fit_subjects(rows, subject_data)
            weights = result.weights
            if weights.layout.rank != self.layout.rank:
                weights = weights.resize(self.layout.rank)
            row_values = weights.flatten().to("cpu", row_values.dtype)
            records = [
                _make_record(row, subject, result, i)
                for i, (row, subject) in enumerate(zip(rows, subject_data, strict=True))
            ]
        metadata = {PLAN_KEY: self.plan.fingerprint, SKIPPED_KEY: "\n".join(skipped)}
        return serialize_shard(row_values, self.layout, records, metadata)

    def fit_subjects(
        self, rows: Sequence[PlannedLora], subject_data: Sequence[SubjectData]
    ) -> FineTuneResult:
        """Fit one LoRA per subject, all at once.

        Args:
            rows: Planned LoRAs (K).
            subject_data: Training data of each row.

        Returns:
            LoRAs and losses of the K subjects.
        """
        recipe = self.plan.recipe
        seeds = [row.seed for row in rows]
        train_examples = TrainingExamples.pad_and_cat([s.train_examples for s in subject_data])
        val_examples = TrainingExamples.pad_and_cat([s.val_examples for s in subject_data])
        probe = ValidationProbe.from_examples(
            val_examples, seeds, eval_every=recipe.eval_every, patience=recipe.patience
        )
        return fine_tune_loras(
            self.base,
            train_examples,
            self.init_codes(rows, subject_data),
            self.parametrization,
            FineTuneConfig(
                num_steps=recipe.finetune_steps,
                lr=recipe.lr,
                lr_scheduler=recipe.lr_scheduler,
                lr_warmup_steps=recipe.lr_warmup_steps,
                shift=recipe.timestep_shift,
                snr_gamma=recipe.snr_gamma,
                batch_size=recipe.batch_size,
                prior_loss_weight=recipe.prior_loss_weight,
                seeds=seeds,
            ),
            prior_examples=self.prior_examples and self.prior_examples.expand_subjects(len(rows)),
            probe=probe,
        )

    def init_codes(
        self, rows: Sequence[PlannedLora], subject_data: Sequence[SubjectData]
    ) -> Tensor:
        """Make the codes to start from.

        Args:
            rows: Planned LoRAs (K), whose seeds ``init="zero"`` uses.
            subject_data: Training data of each row, which ``init="network"`` uses.

        Returns:
            Codes of the parametrization [K, P].
        """
        match self.plan.recipe.init:
            case "network":
                assert self.network is not None
                with torch.no_grad():
                    predictions = [self.network.forward(s.pixels[None]) for s in subject_data]
                codes = torch.cat([prediction.flatten() for prediction in predictions])  # [K, P]
                predicted = LoraWeights.unflatten(predictions[0].layout, codes)
                # only if ranks differ: the signs of an SVD differ from row to row
                if predicted.layout.rank != self.layout.rank:
                    predicted = predicted.resize(self.layout.rank)
                return predicted.flatten()
            case "mean":
                assert self.init_mean is not None
                return self.init_mean.expand(len(rows), -1)
            case "zero":
                generators = [Generator().manual_seed(row.seed) for row in rows]
                return torch.stack([self.parametrization.init_codes(g) for g in generators])
        generator = Generator().manual_seed(self.plan.recipe.seed)
        return self.parametrization.init_codes(generator).expand(len(rows), -1)


def load_recipe_base(recipe: Recipe, device: str = "auto") -> DiffusionBase:
    """Load the base model of a recipe.

    Args:
        recipe: The recipe, which decides the precision.
        device: As ``ComputeConfig`` takes it; by default a GPU if there is one.

    Returns:
        The base model.
    """
    compute = ComputeConfig(device=device, dtype=recipe.dtype)
    return load_diffusion_base(recipe.base, compute, variant=recipe.variant)


def _load_init_network(recipe: Recipe, base: DiffusionBase) -> ImageToLora | None:
    """Load the network whose predictions are the start, if the recipe has one."""
    if recipe.init != "network":
        return None
    network = ImageToLora.from_pretrained(
        recipe.init_from or pretrained.IMAGE_TO_LORA_DIR, base=base
    )
    network.layout.check_base(base.id)
    return network.to(base.device)


def _make_layout(recipe: Recipe, base: DiffusionBase, network: ImageToLora | None) -> LoraLayout:
    """Make the layout of the stored LoRAs."""
    if network is not None:
        network.layout.check_rank(recipe.rank)
        return network.layout.with_rank(recipe.rank)
    return base.make_layout(recipe.denoiser_preset, recipe.rank, text_encoders=recipe.text_encoders)


def _compute_init_mean(recipe: Recipe, layout: LoraLayout) -> Tensor | None:
    """Compute the mean LoRA of a dataset [P], if it is the start."""
    if recipe.init != "mean":
        return None
    dataset = LoraDataset(Path(recipe.init_from))
    layout.check_compatible(dataset.layout, ignore_rank=True)
    stride = -(-len(dataset) // MEAN_SAMPLE_SIZE)
    return dataset.get_weights(range(0, len(dataset), stride)).mean().resize(layout.rank).flatten()


def _make_record(
    row: PlannedLora, subject_data: SubjectData, result: FineTuneResult, index: int
) -> LoraRecord:
    """Make the table row of a fitted LoRA."""
    # losses are NaN after a subject's last step
    train_losses, val_losses = (
        losses[:, index][losses[:, index].isfinite()]
        for losses in (result.losses, result.val_losses)
    )
    return LoraRecord(
        subject=row.subject,
        repetition=row.repetition,
        split=row.split,
        seed=row.seed,
        reference_sha256=subject_data.photo_hashes,
        num_steps=int(result.num_steps[index]),
        loss=float(train_losses[-20:].mean()) if len(train_losses) else None,
        initial_loss=float(val_losses[0]) if len(val_losses) else None,
        best_loss=float(val_losses.min()) if len(val_losses) else None,
    )
