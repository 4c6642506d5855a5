"""The table of a pair network: its LoRAs and every control, and how well their negatives undo the edits."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.image_editing import blend_edit_region
from hyperlora.evaluation.edit_benchmark import EditBenchmark
from hyperlora.evaluation.edit_evaluator import EditEvaluator, EditResult
from hyperlora.evaluation.metrics import Score
from hyperlora.finetuning.examples import TrainingExamples
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.instruction_search import search_pair_lora
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.pipelines.prompt_lora import make_lora_from_prompts

TIMESTEP_SHIFT: Final = 5.0
"""How far timesteps are shifted where LoRAs are optimised for a pair: an edit is decided behind much noise."""


@dataclass(frozen=True)
class ReversalErrors:
    """Mean errors, of 1, of the picture before against: what -Δ makes of the answer, and with the rest kept; what the
    LoRA of the pair turned round makes of it, and with the rest kept; the round trip through the autoencoder, which no
    repainted picture is better than; and the answer itself, as if nothing was undone."""

    negated_lora: Score
    negated_lora_preserved: Score
    reversed_pair: Score
    reversed_pair_preserved: Score
    vae_round_trip: Score
    unchanged_input: Score


def evaluate_edit_suite(
    evaluator: EditEvaluator,
    model: PairToLora,
    *,
    finetune_steps: int = 0,
    finetune_lr: float = 1e-3,
) -> Iterator[EditResult]:
    """Score the ceiling, the copies, the base with and without words, the model, its controls and, if asked, LoRAs
    optimised for each pair; of words, pair and these also where what the edit does not touch stays as it is."""
    benchmark = evaluator.benchmark
    images_per_edit = [len(edit.test_pairs) for edit in benchmark.edits]
    example_outputs = [
        edit.example_pairs[0, 1].expand(n, *edit.example_pairs.shape[2:])
        for edit, n in zip(benchmark.edits, images_per_edit, strict=True)
    ]
    yield evaluator.score_images("the answers, through the autoencoder", evaluator.vae_round_trip)
    yield evaluator.score_images("copy of B", evaluator.inputs)
    yield evaluator.score_images("copy of A'", torch.cat(example_outputs))
    yield (no_lora := evaluator.evaluate("no LoRA", None))

    def add_preserved_result(result: EditResult) -> Iterator[EditResult]:
        yield result
        yield evaluator.score_images(
            f"{result.name}, the rest kept",
            blend_edit_region(evaluator.inputs, result.images, no_lora.images),
        )

    if any(edit.instruction for edit in benchmark.edits):
        yield from add_preserved_result(
            evaluator.evaluate(
                "words instead of a pair", None, prompt_fn=lambda edit: edit.instruction
            )
        )
        if any(edit.blend for edit in benchmark.edits):
            yield evaluator.evaluate(
                "words, blended", None, prompt_fn=lambda edit: edit.blend or edit.instruction
            )
        if model.network.text_substitution is not None:
            instruction_loras = make_lora_from_prompts(
                evaluator.base, [edit.instruction for edit in benchmark.edits], model.layout.rank
            )
            yield evaluator.evaluate("words, as a LoRA", instruction_loras)
    loras, seconds = generate_pair_loras(model, benchmark, 1)
    yield from add_preserved_result(evaluator.evaluate("one pair", loras, seconds=seconds))
    if model.zero_shot_prompts:
        search_loras, elapsed = generate_pair_loras(model, benchmark, 1, base=evaluator.base)
        yield from add_preserved_result(
            evaluator.evaluate("one pair, words tried", search_loras, seconds=elapsed)
        )
        if len(search_loras) > 1:
            yield evaluator.evaluate(
                "another edit's pair, words tried",
                search_loras[torch.arange(len(search_loras)).roll(1)],
            )
    min_pairs = min(len(edit.example_pairs) for edit in benchmark.edits)
    if min_pairs > 1:
        multi_pair_loras, elapsed = generate_pair_loras(model, benchmark, min_pairs)
        yield evaluator.evaluate(f"{min_pairs} pairs", multi_pair_loras, seconds=elapsed)
    if len(loras) > 1:  # of a single edit these would be its own
        yield evaluator.evaluate("another edit's pair", loras[torch.arange(len(loras)).roll(1)])
        yield evaluator.evaluate("mean LoRA, one for all", loras.mean())
    if finetune_steps:
        finetuned_loras, elapsed = fit_pair_loras(
            evaluator.base, model.layout, benchmark, finetune_steps, finetune_lr
        )
        yield from add_preserved_result(
            evaluator.evaluate(
                f"fitted to the pair, {finetune_steps} steps", finetuned_loras, seconds=elapsed
            )
        )


def evaluate_reversal(evaluator: EditEvaluator, model: PairToLora) -> ReversalErrors:
    """By the LoRA of each edit's first pair, words tried if there are any to try."""
    loras, reversed_loras = (
        generate_pair_loras(model, evaluator.benchmark, 1, swap_sides=t, base=evaluator.base)[0]
        for t in (False, True)
    )
    negated_images = evaluator.render_edits("undone", -loras, evaluator.targets)
    reversed_images = evaluator.render_edits("turned round", reversed_loras, evaluator.targets)
    no_lora_images = evaluator.render_edits("asked for nothing", None, evaluator.targets)
    reversal_images = [
        picture
        for one in (negated_images, reversed_images)
        for picture in (one, blend_edit_region(evaluator.targets, one, no_lora_images))
    ]
    vae_images = evaluator.reconstruct_images(evaluator.inputs)
    return ReversalErrors(
        *(
            _compute_l1_error(x, evaluator.inputs)
            for x in (*reversal_images, vae_images, evaluator.targets)
        )
    )


@torch.no_grad()
def generate_pair_loras(
    model: PairToLora,
    benchmark: EditBenchmark,
    num_pairs: int,
    *,
    swap_sides: bool = False,
    base: DiffusionBase | None = None,
) -> tuple[LoraWeights, float]:
    """One LoRA per edit from its first ``num_pairs`` pairs (after and before, if ``turned``), one at a time as a user makes
    them, and seconds: in single forward passes, or with words tried by the ``base``."""
    start_time = time.perf_counter()
    example_pairs = (
        edit.example_pairs[:num_pairs].flip(1) if swap_sides else edit.example_pairs[:num_pairs]
        for edit in benchmark.edits
    )
    loras = [
        search_pair_lora(model, base, pair) if base else model.forward(pair[None])[0]
        for pair in example_pairs
    ]
    return LoraWeights.stack(loras), (time.perf_counter() - start_time) / len(loras)


def fit_pair_loras(
    base: DiffusionBase,
    layout: LoraLayout,
    benchmark: EditBenchmark,
    num_steps: int,
    lr: float,
    batch_size: int = 16,
) -> tuple[LoraWeights, float]:
    """LoRAs of the network's sites and rank, each optimised on its one pair alone through the edit base (what a network
    is to be faster than), and seconds for each."""
    start_time = time.perf_counter()
    example_pairs = torch.stack([edit.example_pairs[0] for edit in benchmark.edits])
    std = (sum(s.in_features for s in layout.targets) / len(layout.targets)) ** -0.5
    flat_loras = []
    for pair_batch in example_pairs.split(batch_size):
        before, after = (base.encode_images(pair_batch[:, side])[:, None] for side in (0, 1))
        prompt_embeds = base.encode_prompts([""])["encoder_hidden_states"].expand(
            len(pair_batch), 1, -1, -1
        )
        conditions = {
            "encoder_hidden_states": prompt_embeds,
            "beside": before / base.pipeline.vae.config.scaling_factor,
        }
        init_codes = LoraWeights.zeros(layout, (len(pair_batch),), std).flatten()
        unflatten = partial(LoraWeights.unflatten, layout)
        result = fine_tune_loras(
            base.denoiser,
            base.noise_scheduler,
            TrainingExamples(after, conditions),
            init_codes,
            unflatten,
            num_steps=num_steps,
            lr=lr,
            shift=TIMESTEP_SHIFT,
            progress_label="fitting",
        )
        flat_loras.append(result.weights.flatten())
    weights = LoraWeights.unflatten(layout, torch.cat(flat_loras))
    return weights, (time.perf_counter() - start_time) / len(weights)


def _compute_l1_error(images: Tensor, target_images: Tensor) -> Score:
    return Score.from_samples((images - target_images).abs().mean((1, 2, 3)))
