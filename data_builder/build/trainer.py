"""``Farm``: one frozen base on which the chunks of a plan are fitted, K subjects at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from data_builder.build.plan import Plan, Planned, Recipe, printable
from data_builder.build.subject_data import Material, class_examples, material
from data_builder.sources.sources import opened
from hyperlora import pretrained
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.data.lora_shards import LoraRecord, shard_bytes
from hyperlora.diffusion.diffusion_base import Base, load_base
from hyperlora.diffusion.target_modules import layout_of
from hyperlora.errors import BadImage
from hyperlora.finetuning.examples import Examples, Probe
from hyperlora.finetuning.trainer import Fitted, fit
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.parametrizations import Lightweight, space
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora import ImageToLora

PLAN, SKIPPED = "hyperlora.plan", "hyperlora.skipped"
MEAN_OF = 128
"""LoRAs, spread over the dataset, whose mean a fit may start at."""


class Farm:
    """``chunk(number)`` is a whole shard of the plan, the same whenever and wherever it is made on like machines.

    ``class_latents`` (``materials.class_latents``) are needed where the recipe asks for prior preservation. Raises
    ``LayoutMismatch`` if the network or dataset to start from is for another base.
    """

    def __init__(self, plan: Plan, base: Base, class_latents: Tensor | None = None) -> None:
        self.plan, self.base, recipe = plan, base, plan.recipe
        self.source = opened(plan.source)
        self.network = _network(recipe, base)
        self.layout = _layout(recipe, base, self.network)
        self.space = space(recipe.space.replace("locon", "lora"), self.layout, recipe.inner)
        if isinstance(self.space, Lightweight):
            self.space.lidb.to(base.pipeline.device)
        self.mean = _mean(recipe, self.layout)
        self.prior = None if class_latents is None else class_examples(base, recipe, class_latents)
        if recipe.checkpointing:
            denoiser: Any = base.denoiser
            denoiser.enable_gradient_checkpointing()

    def chunk(self, number: int) -> bytes:
        """The shard of chunk ``number``; subjects whose photos cannot be read any more are named in its header."""
        recipe, rows, materials, skipped = self.plan.recipe, [], [], []
        for row in self.plan.chunk(number):
            try:
                materials.append(material(row, self.source, self.base, recipe))
                rows.append(row)
            except BadImage as error:
                skipped.append(printable(f"{row.subject}: {error}"))
        numbers = torch.zeros(0, self.layout.numel, dtype=getattr(torch, recipe.rows))
        table: list[LoraRecord] = []
        if rows:
            fitted = self.fit(rows, materials)
            weights = fitted.weights
            if weights.layout.rank != self.layout.rank:
                weights = weights.resize(self.layout.rank)
            numbers = weights.flatten().to("cpu", numbers.dtype)
            table = [_record(row, m, fitted, i) for i, (row, m) in enumerate(zip(rows, materials, strict=True))]
        notes = {PLAN: self.plan.digest, SKIPPED: "\n".join(skipped)}
        return shard_bytes(numbers, self.layout, table, notes)

    def fit(self, rows: Sequence[Planned], materials: Sequence[Material]) -> Fitted:
        recipe, device = self.plan.recipe, self.base.pipeline.device
        seeds = [row.seed for row in rows]
        measure = Examples.joined([m.measure for m in materials])
        probe = Probe.of(measure, seeds, every=recipe.every, patience=recipe.patience)
        return fit(
            self.base.denoiser, self.base.noise_schedule, Examples.joined([m.examples for m in materials]),
            self.start(rows, materials).to(device), self.space, steps=recipe.steps, lr=recipe.lr, batch=recipe.batch,
            prior=self.prior and self.prior.shared(len(rows)), prior_weight=recipe.prior_weight, seeds=seeds,
            probe=probe,
        )  # fmt: skip

    def start(self, rows: Sequence[Planned], materials: Sequence[Material]) -> Tensor:
        """Codes [K, size] to begin with."""
        match self.plan.recipe.start:
            case "network":
                assert self.network is not None
                with torch.no_grad():
                    parts = [self.network.forward(m.pixels[None]) for m in materials]
                predicted = LoraWeights.unflatten(parts[0].layout, torch.cat([p.flatten() for p in parts]))
                if predicted.layout.rank != self.layout.rank:
                    predicted = predicted.resize(self.layout.rank)  # by SVD, whose signs differ from row to row
                return predicted.flatten()
            case "mean":
                assert self.mean is not None
                return self.mean.expand(len(rows), -1)
            case "zero":
                return torch.stack([self.space.start(Generator().manual_seed(row.seed)) for row in rows])
        return self.space.start(Generator().manual_seed(self.plan.recipe.seed)).expand(len(rows), -1)


def open_base(recipe: Recipe) -> Base:
    """The recipe's base, on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_base(recipe.base, recipe.dtype, device, variant=recipe.variant)


def _network(recipe: Recipe, base: Base) -> ImageToLora | None:
    if recipe.start != "network":
        return None
    network = ImageToLora.from_pretrained(recipe.start_from or pretrained.MODEL, base=base)
    network.layout.require_base(base.id)
    return network


def _layout(recipe: Recipe, base: Base, network: ImageToLora | None) -> LoraLayout:
    if network is not None:
        return network.layout.with_rank(recipe.rank)
    preset = "attention+conv" if recipe.space == "locon" else recipe.preset
    return layout_of({next(iter(base.modules)): base.denoiser}, preset, recipe.rank, base.id)


def _mean(recipe: Recipe, layout: LoraLayout) -> Tensor | None:
    if recipe.start != "mean":
        return None
    dataset = LoraDataset(Path(recipe.start_from))
    layout.require(dataset.layout, any_rank=True)
    every = -(-len(dataset) // MEAN_OF)
    return dataset.lora(range(0, len(dataset), every)).mean().resize(layout.rank).flatten()


def _record(row: Planned, m: Material, fitted: Fitted, i: int) -> LoraRecord:
    losses, looks = (t[:, i][t[:, i].isfinite()] for t in (fitted.losses, fitted.looks))
    return LoraRecord(
        subject=row.subject, view=row.view, split=row.split, seed=row.seed, images=m.digests,
        steps=int(fitted.taken[i]), loss=float(losses[-20:].mean()) if len(losses) else None,
        before=float(looks[0]) if len(looks) else None, after=float(looks.min()) if len(looks) else None,
    )  # fmt: skip
