"""``ChunkTrainer``: one frozen base on which the chunks of a plan are fitted, K subjects at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from data_builder.build.plan import Plan, PlannedLora, Recipe, replace_invalid_utf8
from data_builder.build.subject_data import SubjectData, load_subject, make_class_examples
from data_builder.sources.sources import source_from_dict
from hyperlora import pretrained
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.data.lora_shards import LoraRecord, serialize_shard
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.errors import InvalidImageError
from hyperlora.finetuning.examples import TrainingExamples, ValidationProbe
from hyperlora.finetuning.trainer import FineTuneResult, fine_tune_loras
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.parametrizations import LidbParametrization, make_parametrization
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora import ImageToLora

PLAN_KEY, SKIPPED_KEY = "hyperlora.plan", "hyperlora.skipped"
MEAN_SAMPLE_SIZE = 128
"""LoRAs, spread over the dataset, whose mean a fit may start at."""


class ChunkTrainer:
    """``build_chunk(number)`` is a whole shard of the plan, the same whenever and wherever it is made on like machines.

    ``sample_class_latents`` (``subject_data.sample_class_latents``) are needed where the recipe asks for prior preservation. Raises
    ``LayoutMismatchError`` if the network or dataset to start from is for another base.
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
            self.parametrization.lidb.to(base.pipeline.device)
        self.init_mean = _compute_init_mean(recipe, self.layout)
        self.prior_examples = (
            None if class_latents is None else make_class_examples(base, recipe, class_latents)
        )
        if recipe.gradient_checkpointing:
            denoiser: Any = base.denoiser
            denoiser.enable_gradient_checkpointing()

    def build_chunk(self, number: int) -> bytes:
        """The shard of chunk ``format_score``; subjects whose photos cannot be read any more are named in its header."""
        recipe, rows, subject_data, skipped = self.plan.recipe, [], [], []
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
                _make_record(row, m, result, i)
                for i, (row, m) in enumerate(zip(rows, subject_data, strict=True))
            ]
        metadata = {PLAN_KEY: self.plan.fingerprint, SKIPPED_KEY: "\n".join(skipped)}
        return serialize_shard(row_values, self.layout, records, metadata)

    def fit_subjects(
        self, rows: Sequence[PlannedLora], subject_data: Sequence[SubjectData]
    ) -> FineTuneResult:
        recipe, device = self.plan.recipe, self.base.pipeline.device
        seeds = [row.seed for row in rows]
        val_examples = TrainingExamples.pad_and_cat([m.val_examples for m in subject_data])
        probe = ValidationProbe.from_examples(
            val_examples, seeds, eval_every=recipe.eval_every, patience=recipe.patience
        )
        return fine_tune_loras(
            self.base.denoiser,
            self.base.noise_scheduler,
            TrainingExamples.pad_and_cat([m.train_examples for m in subject_data]),
            self.init_codes(rows, subject_data).to(device),
            self.parametrization,
            num_steps=recipe.finetune_steps,
            lr=recipe.lr,
            batch_size=recipe.batch_size,
            prior_examples=self.prior_examples and self.prior_examples.expand_subjects(len(rows)),
            prior_loss_weight=recipe.prior_loss_weight,
            seeds=seeds,
            probe=probe,
        )

    def init_codes(
        self, rows: Sequence[PlannedLora], subject_data: Sequence[SubjectData]
    ) -> Tensor:
        """Codes [K, size] to begin with."""
        match self.plan.recipe.init:
            case "network":
                assert self.network is not None
                with torch.no_grad():
                    predictions = [self.network.forward(m.pixels[None]) for m in subject_data]
                predicted = LoraWeights.unflatten(
                    predictions[0].layout, torch.cat([p.flatten() for p in predictions])
                )
                if predicted.layout.rank != self.layout.rank:
                    predicted = predicted.resize(
                        self.layout.rank
                    )  # by SVD, whose signs differ from row to row
                return predicted.flatten()
            case "mean":
                assert self.init_mean is not None
                return self.init_mean.expand(len(rows), -1)
            case "zero":
                return torch.stack(
                    [
                        self.parametrization.init_codes(Generator().manual_seed(row.seed))
                        for row in rows
                    ]
                )
        return self.parametrization.init_codes(
            Generator().manual_seed(self.plan.recipe.seed)
        ).expand(len(rows), -1)


def load_recipe_base(recipe: Recipe) -> DiffusionBase:
    """The recipe's base, on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_diffusion_base(recipe.base, recipe.dtype, device, variant=recipe.variant)


def _load_init_network(recipe: Recipe, base: DiffusionBase) -> ImageToLora | None:
    if recipe.init != "network":
        return None
    network = ImageToLora.from_pretrained(
        recipe.init_from or pretrained.IMAGE_TO_LORA_DIR, base=base
    )
    network.layout.check_base(base.id)
    return network


def _make_layout(recipe: Recipe, base: DiffusionBase, network: ImageToLora | None) -> LoraLayout:
    if network is not None:
        return network.layout.with_rank(recipe.rank)
    preset = "attention+conv" if recipe.parametrization == "locon" else recipe.preset
    return make_layout({next(iter(base.modules)): base.denoiser}, preset, recipe.rank, base.id)


def _compute_init_mean(recipe: Recipe, layout: LoraLayout) -> Tensor | None:
    if recipe.init != "mean":
        return None
    dataset = LoraDataset(Path(recipe.init_from))
    layout.check_compatible(dataset.layout, ignore_rank=True)
    stride = -(-len(dataset) // MEAN_SAMPLE_SIZE)
    return dataset.get_weights(range(0, len(dataset), stride)).mean().resize(layout.rank).flatten()


def _make_record(
    row: PlannedLora, subject_data: SubjectData, result: FineTuneResult, index: int
) -> LoraRecord:
    train_losses, val_losses = (
        t[:, index][t[:, index].isfinite()] for t in (result.losses, result.val_losses)
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
