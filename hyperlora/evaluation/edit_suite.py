"""Suite of an edit evaluation: LoRAs of a pair model, controls, reversal by negated LoRAs."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.image_editing import blend_edit_region
from hyperlora.evaluation.edit_benchmark import EditBenchmark
from hyperlora.evaluation.edit_evaluator import EditEvaluator, EditResult
from hyperlora.evaluation.metrics import Score
from hyperlora.finetuning.config import FineTuneConfig
from hyperlora.finetuning.examples import TrainingExamples
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.instruction_search import search_pair_lora
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.pipelines.prompt_lora import make_lora_from_prompts

PRESERVED_SUFFIX: Final = "+ background preserved"
TIMESTEP_SHIFT: Final = 5.0
"""Timestep shift of LoRAs fitted to a pair: an edit is decided at high noise."""


@dataclass(frozen=True)
class ReversalErrors:
    """Mean L1 errors against the input image, of 1, after an edit was undone on the target.

    Attributes:
        negated_lora: By the negated LoRA.
        negated_lora_preserved: By the negated LoRA, with the background preserved.
        reversed_pair: By the LoRA of the pair with its sides swapped.
        reversed_pair_preserved: By that LoRA, with the background preserved.
        vae_round_trip: Of the input itself after encoding and decoding: the floor of any edit.
        unchanged_input: Of the target itself, if nothing is undone.
    """

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
    """Evaluate references, text instructions, the LoRAs of a pair model, its controls, and fitted
    LoRAs.

    Important rows appear a second time with the background preserved (``blend_edit_region``).

    Args:
        evaluator: Benchmark and edit base.
        model: Model from pairs to LoRAs.
        finetune_steps: Steps of LoRAs fitted to each pair; 0: none.
        finetune_lr: Learning rate of those.

    Yields:
        The rows of the table, each as soon as it is done.
    """
    benchmark = evaluator.benchmark
    yield from _evaluate_references(evaluator)
    yield (no_lora := evaluator.evaluate("no LoRA", None))
    add_preserved_result = partial(_add_preserved_result, evaluator, no_lora)
    if any(edit.instruction for edit in benchmark.edits):
        result = evaluator.evaluate(
            "text instruction", None, prompt_fn=lambda edit: edit.instruction
        )
        yield from add_preserved_result(result)
        yield from _evaluate_instruction_variants(evaluator, model)
    loras, seconds = generate_pair_loras(model, benchmark, 1)
    yield from add_preserved_result(evaluator.evaluate("one pair", loras, seconds=seconds))
    if model.zero_shot_prompts:
        search_loras, elapsed = generate_pair_loras(model, benchmark, 1, base=evaluator.base)
        result = evaluator.evaluate("one pair + instruction search", search_loras, seconds=elapsed)
        yield from add_preserved_result(result)
        if len(search_loras) > 1:
            yield evaluator.evaluate(
                "shuffled pair + instruction search", search_loras.shuffle_batch()
            )
    min_pairs = min(len(edit.example_pairs) for edit in benchmark.edits)
    if min_pairs > 1:
        multi_pair_loras, elapsed = generate_pair_loras(model, benchmark, min_pairs)
        yield evaluator.evaluate(f"{min_pairs} pairs", multi_pair_loras, seconds=elapsed)
    if len(loras) > 1:  # of a single edit these would be its own
        yield evaluator.evaluate("shuffled pair", loras.shuffle_batch())
        yield evaluator.evaluate("mean LoRA", loras.mean())
    if finetune_steps:
        finetuned_loras, elapsed = fit_pair_loras(
            evaluator.base, model.layout, benchmark, finetune_steps, finetune_lr
        )
        name = f"fine-tuned on the pair, {finetune_steps} steps"
        yield from add_preserved_result(evaluator.evaluate(name, finetuned_loras, seconds=elapsed))


def _evaluate_references(evaluator: EditEvaluator) -> Iterator[EditResult]:
    """Score the target itself, the unchanged input and the example output."""
    yield evaluator.score_images("target (VAE round trip)", evaluator.vae_round_trip)
    yield evaluator.score_images("input unchanged", evaluator.inputs)
    example_outputs = [
        edit.example_pairs[0, 1].expand_as(edit.test_pairs[:, 1])
        for edit in evaluator.benchmark.edits
    ]
    yield evaluator.score_images("copy of A' (example output)", torch.cat(example_outputs))


def _add_preserved_result(
    evaluator: EditEvaluator, no_lora: EditResult, result: EditResult
) -> Iterator[EditResult]:
    """Yield a result, then the same images with the background preserved."""
    yield result
    blended = blend_edit_region(evaluator.inputs, result.images, no_lora.images)
    yield evaluator.score_images(f"{result.name} {PRESERVED_SUFFIX}", blended)


def _evaluate_instruction_variants(
    evaluator: EditEvaluator, model: PairToLora
) -> Iterator[EditResult]:
    """Evaluate blended text instructions, and instructions as LoRAs, where there are such."""
    edits = evaluator.benchmark.edits
    if any(edit.blend for edit in edits):
        yield evaluator.evaluate(
            "text instruction, blended", None, prompt_fn=lambda edit: edit.blend or edit.instruction
        )
    if model.network.text_substitution is not None:
        instructions = [edit.instruction for edit in edits]
        loras = make_lora_from_prompts(evaluator.base, instructions, model.layout.rank)
        yield evaluator.evaluate("text instruction as LoRA", loras)


def evaluate_reversal(evaluator: EditEvaluator, model: PairToLora) -> ReversalErrors:
    """Measure how well an edit is undone, by the negated LoRA and by the LoRA of the reversed pair.

    Args:
        evaluator: Benchmark and edit base.
        model: Model from pairs to LoRAs; with instruction search where it has zero-shot prompts.

    Returns:
        Errors against the input images.
    """
    loras, reversed_loras = (
        generate_pair_loras(
            model, evaluator.benchmark, 1, swap_sides=swap_sides, base=evaluator.base
        )[0]
        for swap_sides in (False, True)
    )
    targets, inputs = evaluator.targets, evaluator.inputs
    negated = evaluator.render_edits("negated LoRA", -loras, targets)
    reversed_ = evaluator.render_edits("reversed pair", reversed_loras, targets)
    no_lora = evaluator.render_edits("no LoRA", None, targets)
    return ReversalErrors(
        negated_lora=_compute_l1_error(negated, inputs),
        negated_lora_preserved=_compute_l1_error(
            blend_edit_region(targets, negated, no_lora), inputs
        ),
        reversed_pair=_compute_l1_error(reversed_, inputs),
        reversed_pair_preserved=_compute_l1_error(
            blend_edit_region(targets, reversed_, no_lora), inputs
        ),
        vae_round_trip=_compute_l1_error(evaluator.reconstruct_images(inputs), inputs),
        unchanged_input=_compute_l1_error(targets, inputs),
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
    """Generate one LoRA per edit, one at a time as for a single request.

    Args:
        model: Model from pairs to LoRAs.
        benchmark: Edits with example pairs.
        num_pairs: Example pairs of each edit, the first ones.
        swap_sides: Whether to swap before and after.
        base: Edit base for instruction search; None: a single forward pass.

    Returns:
        One LoRA per edit, and the seconds per LoRA.
    """
    start_time = time.perf_counter()
    example_pairs = (
        edit.example_pairs[:num_pairs].flip(1) if swap_sides else edit.example_pairs[:num_pairs]
        for edit in benchmark.edits
    )
    loras = [
        search_pair_lora(model, base, pairs) if base else model.forward(pairs[None])[0]
        for pairs in example_pairs
    ]
    stacked_loras = LoraWeights.stack(loras).to("cpu")  # which waits for an accelerator
    return stacked_loras, (time.perf_counter() - start_time) / len(loras)


def fit_pair_loras(
    base: DiffusionBase,
    layout: LoraLayout,
    benchmark: EditBenchmark,
    num_steps: int,
    lr: float,
    batch_size: int = 16,
) -> tuple[LoraWeights, float]:
    """Fit a LoRA to the first example pair of each edit through the edit base: the baseline of a
    pair model.

    Args:
        base: Edit base.
        layout: Layout of the LoRAs.
        benchmark: Edits with example pairs.
        num_steps: Optimizer steps.
        lr: Learning rate of Adam.
        batch_size: Edits that are fitted together.

    Returns:
        One LoRA per edit, and the seconds per LoRA.
    """
    start_time = time.perf_counter()
    example_pairs = torch.stack([edit.example_pairs[0] for edit in benchmark.edits])
    config = FineTuneConfig(
        num_steps=num_steps, lr=lr, shift=TIMESTEP_SHIFT, progress_label="fine-tuning"
    )
    flat_loras = []
    for pair_batch in example_pairs.split(batch_size):
        before, after = (base.encode_images(pair_batch[:, side])[:, None] for side in (0, 1))
        prompt_embeds = base.encode_prompts([""])["prompt_embeds"]  # [1, tokens, width]
        conditions: Conditions = {
            "prompt_embeds": prompt_embeds.expand(len(pair_batch), 1, -1, -1),
            "image_latents": before,
        }
        init_codes = LoraWeights.zeros(layout, (len(pair_batch),), layout.init_std).flatten()
        unflatten = partial(LoraWeights.unflatten, layout)
        result = fine_tune_loras(
            base,
            TrainingExamples(after, conditions),
            init_codes,
            unflatten,
            config,
        )
        flat_loras.append(result.weights.flatten())
    weights = LoraWeights.unflatten(layout, torch.cat(flat_loras).cpu())
    return weights, (time.perf_counter() - start_time) / len(weights)


def _compute_l1_error(images: Tensor, target_images: Tensor) -> Score:
    """Mean absolute error of each image [n, 3, h, w]."""
    return Score.from_samples((images - target_images).abs().mean((1, 2, 3)))
