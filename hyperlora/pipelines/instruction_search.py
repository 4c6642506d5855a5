"""``InstructionSearch``: instructions that a network does not predict, scored by the base.

The score of an instruction is the denoising error of the base when it reconstructs A' from noise
with A as condition: a diffusion model is a classifier (Li et al., 2303.16203).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.data.batching import split_batches
from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.diffusion_base import DiffusionBase, PromptCache
from hyperlora.diffusion.image_editing import check_edit_base
from hyperlora.diffusion.losses import compute_denoising_loss, compute_edit_region_weights
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.input_checks import is_near_duplicate
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.pipelines.prompt_lora import substitute_prompts
from hyperlora.prompt_blending import apply_prompt_template, combine_blends

NO_INSTRUCTION_HEAD: Final = (
    "candidate prompts need a model with an instruction head, and this one has none: leave them out"
)
MAX_UNEXPLAINED: Final = 0.2
"""The search ends if the predicted instruction leaves this share of the empty one's error."""
MAX_ERROR_VS_INSTRUCTION: Final = 0.8
"""A candidate must leave at most this share of the predicted instruction's error, ..."""
MAX_ERROR_VS_EMPTY: Final = 0.5
"""... and at most this share of the empty instruction's error. With the bundled base, validation
subjects then keep the predicted instruction for edits of seen kinds."""
_TIMESTEP_FRACTION: Final = 0.999
"""The timestep of the score, from 0 to 1: at the noisiest, only the instruction gives the edit."""
_NUM_COMBINATIONS: Final = 4
"""Candidates of the lowest error that are also scored together with the predicted instruction."""
_EDIT_REGION_WEIGHT: Final = 4.0
"""The loss weight of a latent pixel that the edit changes, relative to others."""
_BATCH_SIZE: Final = 16
"""Images in one forward pass of the base."""


@dataclass(frozen=True)
class InstructionSearch:
    """A search for the instruction that explains a pair best; the ``search`` of a ``PairToLora``.

    Attributes:
        base: The base of the LoRAs, an InstructPix2Pix pipeline.
        candidate_prompts: Instructions to try; None for the model's ``zero_shot_prompts``.
    """

    base: DiffusionBase
    candidate_prompts: Sequence[str] | None = None

    @property
    def resolution(self) -> int:
        """Pixels per side of the images that the base encodes."""
        return self.base.resolution

    def __call__(self, model: PairToLora, pairs: Tensor) -> LoraWeights:
        """Generate the LoRA of one edit; see ``search_pair_lora``.

        Args:
            model: The model of edits.
            pairs: [pairs, 2, 3, size, size] in [0, 1].

        Returns:
            One LoRA without batch axis.

        Raises:
            InvalidArgumentError: There are candidates but no instruction head, or the base is no
                InstructPix2Pix pipeline.
        """
        return search_pair_lora(model, self.base, pairs, self.candidate_prompts)


@torch.no_grad()
def search_pair_lora(
    model: PairToLora,
    base: DiffusionBase,
    pairs: Tensor,
    candidate_prompts: Sequence[str] | None = None,
) -> LoraWeights:
    """Generate the LoRA of one edit with the instruction that explains it best.

    If the predicted instruction leaves much of the edit unexplained, and a candidate explains it,
    alone or combined with the prediction, the LoRA stands for that candidate instead. The
    instruction that undoes the edit is searched in the same way.

    SDXL's pooled text takes part in the score, though no LoRA can change it.

    Args:
        model: The model of edits.
        base: The base of the LoRAs, an InstructPix2Pix pipeline.
        pairs: Pairs that show the edit, [pairs, 2, 3, size, size] in [0, 1], of the base's
            resolution or larger.
        candidate_prompts: Instructions to try; None for the model's ``zero_shot_prompts``.

    Returns:
        One LoRA without batch axis: the model's own if there is no candidate or if both images of
        all pairs are the same.

    Raises:
        InvalidArgumentError: There are candidates but no instruction head, or the base is no
            InstructPix2Pix pipeline.
    """
    before, after = model.encoder(pairs[None, :, 0]), model.encoder(pairs[None, :, 1])
    candidates = model.zero_shot_prompts if candidate_prompts is None else candidate_prompts
    if not candidates or all(is_near_duplicate(*pair) for pair in pairs):
        return model.generate_from_features(before, after)[0]
    if model.network.instruction_head is None:
        raise InvalidArgumentError(NO_INSTRUCTION_HEAD)
    check_edit_base(base)
    instruction = model.network.predict_instructions(before, after)[0]
    undo_instruction = model.network.predict_instructions(after, before)[0]
    before_latents = base.encode_images(_resize_images(pairs[:, 0], base.resolution))
    after_latents = base.encode_images(_resize_images(pairs[:, 1], base.resolution))
    cache: PromptCache = {}
    best_instruction = _select_instruction(
        base, before_latents, after_latents, instruction, candidates, cache
    )
    best_undo_instruction = _select_instruction(
        base, after_latents, before_latents, undo_instruction, candidates, cache
    )
    lora = model.network(before, after)
    if (best_instruction, best_undo_instruction) != (instruction, undo_instruction):
        undo_template = model.network.instruction_head.vocabulary.undo_template
        prompt = _combine_with_undo(best_instruction, best_undo_instruction, undo_template)
        lora = substitute_prompts(base, [prompt], lora)
    return model.apply_strength(lora)[0]


def _combine_with_undo(instruction: str, undo_instruction: str, undo_template: str | None) -> str:
    """Return the blend "instruction minus what restores the original", as the network trains it."""
    weights = {instruction: 1.0}
    if undo_template:
        weights |= {apply_prompt_template(undo_instruction, undo_template): -1.0}
    return combine_blends(weights)


def _select_instruction(
    base: DiffusionBase,
    before: Tensor,
    after: Tensor,
    instruction: str,
    candidates: Sequence[str],
    cache: PromptCache,
) -> str:
    """Return the predicted instruction, or the candidate that explains the edit better.

    ``before`` and ``after`` are latents [pairs, c, h, w]; ``cache`` keeps text embeddings.
    """
    empty_error, instruction_error = _compute_instruction_errors(
        base, before, after, ["", instruction], cache
    )
    if instruction_error <= MAX_UNEXPLAINED * empty_error:
        return instruction
    candidate_errors = _compute_instruction_errors(base, before, after, candidates, cache)
    best_candidates = [
        candidates[i] for i in candidate_errors.argsort()[:_NUM_COMBINATIONS].tolist()
    ]
    combinations = [
        combine_blends({instruction: 1.0} | {candidate: 1.0}) for candidate in best_candidates
    ]
    combination_errors = _compute_instruction_errors(base, before, after, combinations, cache)
    options = [*candidates, *combinations]
    errors = torch.cat([candidate_errors, combination_errors])  # [options]
    best_index = int(errors.argmin())
    max_error = min(MAX_ERROR_VS_INSTRUCTION * instruction_error, MAX_ERROR_VS_EMPTY * empty_error)
    return options[best_index] if errors[best_index] < max_error else instruction


def _compute_instruction_errors(
    base: DiffusionBase,
    before: Tensor,
    after: Tensor,
    instructions: Sequence[str],
    cache: PromptCache,
) -> Tensor:
    """Compute the denoising error of A' per instruction [instructions], all by the same noise."""
    noise = torch.randn(after.shape, generator=torch.Generator().manual_seed(0)).to(after)
    region_weights = compute_edit_region_weights(before, after, _EDIT_REGION_WEIGHT)
    items = [(text, pair_index) for text in instructions for pair_index in range(len(after))]
    losses = []
    for batch in split_batches(items, _BATCH_SIZE):
        pair_indices = [pair_index for _, pair_index in batch]
        conditions: Conditions = {
            **base.encode_prompts([text for text, _ in batch], cache),
            "image_latents": before[pair_indices],
        }
        u = torch.full((len(batch),), _TIMESTEP_FRACTION, device=after.device)
        losses.append(
            compute_denoising_loss(
                base.predict,
                base.noise_scheduler,
                after[pair_indices],
                conditions,
                noise_sample=(u, noise[pair_indices]),
                weight=region_weights[pair_indices],
            )
        )
    return torch.cat(losses).view(len(instructions), len(after)).mean(1)


def _resize_images(images: Tensor, size: int) -> Tensor:
    """Shrink images [n, 3, h, w] to the base's resolution."""
    return images if images.shape[-1] == size else F.interpolate(images, (size, size), mode="area")
