"""The table of a pair network: its LoRAs and every control, and how well their negatives undo the edits."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import Base
from hyperlora.diffusion.image_editing import kept
from hyperlora.evaluation.edit_benchmark import EditBenchmark
from hyperlora.evaluation.edit_evaluator import EditJudge, EditRow
from hyperlora.evaluation.metrics import Score
from hyperlora.finetuning.examples import Examples
from hyperlora.finetuning.trainer import fit
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.instruction_search import lora_of_pairs
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.pipelines.prompt_lora import lora_of_words

NOISIER: Final = 5.0
"""How far timesteps are shifted where LoRAs are optimised for a pair: an edit is decided behind much noise."""


@dataclass(frozen=True)
class Undone:
    """Mean errors, of 1, of the picture before against: what -Δ makes of the answer, and with the rest kept; what the
    LoRA of the pair turned round makes of it, and with the rest kept; the round trip through the autoencoder, which no
    repainted picture is better than; and the answer itself, as if nothing was undone."""

    undone: Score
    undone_kept: Score
    turned: Score
    turned_kept: Score
    round_trip: Score
    untouched: Score


def edit_rows(judge: EditJudge, model: PairToLora, *, fit_steps: int = 0, fit_lr: float = 1e-3) -> Iterator[EditRow]:
    """Score the ceiling, the copies, the base with and without words, the model, its controls and, if asked, LoRAs
    optimised for each pair; of words, pair and these also where what the edit does not touch stays as it is."""
    benchmark = judge.benchmark
    sizes = [len(edit.others) for edit in benchmark.edits]
    shown = [edit.shown[0, 1].expand(n, *edit.shown.shape[2:]) for edit, n in zip(benchmark.edits, sizes, strict=True)]
    yield judge.scored("the answers, through the autoencoder", judge.round_trip)
    yield judge.scored("copy of B", judge.before)
    yield judge.scored("copy of A'", torch.cat(shown))
    yield (nothing := judge.row("no LoRA", None))

    def with_rest_kept(row: EditRow) -> Iterator[EditRow]:
        yield row
        yield judge.scored(f"{row.name}, the rest kept", kept(judge.before, row.pictures, nothing.pictures))

    if any(edit.instruction for edit in benchmark.edits):
        yield from with_rest_kept(judge.row("words instead of a pair", None, told=lambda edit: edit.instruction))
        if any(edit.blend for edit in benchmark.edits):
            yield judge.row("words, blended", None, told=lambda edit: edit.blend or edit.instruction)
        if model.network.sites is not None:
            said = lora_of_words(judge.base, [edit.instruction for edit in benchmark.edits], model.layout.rank)
            yield judge.row("words, as a LoRA", said)
    lora, seconds = pair_loras(model, benchmark, 1)
    yield from with_rest_kept(judge.row("one pair", lora, seconds=seconds))
    if model.further:
        sure, took = pair_loras(model, benchmark, 1, base=judge.base)
        yield from with_rest_kept(judge.row("one pair, words tried", sure, seconds=took))
        if len(sure) > 1:
            yield judge.row("another edit's pair, words tried", sure[torch.arange(len(sure)).roll(1)])
    fewest = min(len(edit.shown) for edit in benchmark.edits)
    if fewest > 1:
        several, took = pair_loras(model, benchmark, fewest)
        yield judge.row(f"{fewest} pairs", several, seconds=took)
    if len(lora) > 1:  # of a single edit these would be its own
        yield judge.row("another edit's pair", lora[torch.arange(len(lora)).roll(1)])
        yield judge.row("mean LoRA, one for all", lora.mean())
    if fit_steps:
        fitted, took = fitted_to_pairs(judge.base, model.layout, benchmark, fit_steps, fit_lr)
        yield from with_rest_kept(judge.row(f"fitted to the pair, {fit_steps} steps", fitted, seconds=took))


def undone(judge: EditJudge, model: PairToLora) -> Undone:
    """By the LoRA of each edit's first pair, words tried if there are any to try."""
    lora, turned_round = (pair_loras(model, judge.benchmark, 1, turned=t, base=judge.base)[0] for t in (False, True))
    made = judge.edited("undone", -lora, judge.answers)
    turned = judge.edited("turned round", turned_round, judge.answers)
    nothing = judge.edited("asked for nothing", None, judge.answers)
    both = [picture for one in (made, turned) for picture in (one, kept(judge.answers, one, nothing))]
    around = judge.through_autoencoder(judge.before)
    return Undone(*(_error(x, judge.before) for x in (*both, around, judge.answers)))


@torch.no_grad()
def pair_loras(
    model: PairToLora, benchmark: EditBenchmark, pairs: int, *, turned: bool = False, base: Base | None = None
) -> tuple[LoraWeights, float]:
    """One LoRA per edit from its first ``pairs`` pairs (after and before, if ``turned``), one at a time as a user makes
    them, and seconds: in single forward passes, or with words tried by the ``base``."""
    began = time.perf_counter()
    shown = (edit.shown[:pairs].flip(1) if turned else edit.shown[:pairs] for edit in benchmark.edits)
    loras = [lora_of_pairs(model, base, pair) if base else model.forward(pair[None])[0] for pair in shown]
    return LoraWeights.stack(loras), (time.perf_counter() - began) / len(loras)


def fitted_to_pairs(
    base: Base, layout: LoraLayout, benchmark: EditBenchmark, steps: int, lr: float, chunk: int = 16
) -> tuple[LoraWeights, float]:
    """LoRAs of the network's sites and rank, each optimised on its one pair alone through the edit base (what a network
    is to be faster than), and seconds for each."""
    began = time.perf_counter()
    shown = torch.stack([edit.shown[0] for edit in benchmark.edits])
    std = (sum(s.fan_in for s in layout.sites) / len(layout.sites)) ** -0.5
    parts = []
    for some in shown.split(chunk):
        before, after = (base.encode_images(some[:, side])[:, None] for side in (0, 1))
        text = base.encode_prompts([""])["encoder_hidden_states"].expand(len(some), 1, -1, -1)
        conditions = {"encoder_hidden_states": text, "beside": before / base.pipeline.vae.config.scaling_factor}
        start = LoraWeights.zeros(layout, (len(some),), std).flatten()
        expand = partial(LoraWeights.unflatten, layout)
        done = fit(
            base.denoiser, base.noise_schedule, Examples(after, conditions), start, expand, steps=steps, lr=lr,
            shift=NOISIER, label="fitting",
        )  # fmt: skip
        parts.append(done.weights.flatten())
    weights = LoraWeights.unflatten(layout, torch.cat(parts))
    return weights, (time.perf_counter() - began) / len(weights)


def _error(made: Tensor, wanted: Tensor) -> Score:
    return Score.of((made - wanted).abs().mean((1, 2, 3)))
