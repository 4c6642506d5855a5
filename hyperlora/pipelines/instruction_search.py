"""Words that a network never learned to say: the base tries them on the pair, and what explains it best is said.

How well words explain a pair is told by the error that the base makes when it is to find A' behind noise, sees A beside
it and is told them: a diffusion model is a classifier (Li et al., 2303.16203).
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.diffusion.diffusion_base import DiffusionBase, PromptCache
from hyperlora.diffusion.image_editing import check_edit_base
from hyperlora.diffusion.losses import compute_denoising_loss, compute_edit_region_weights
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.input_checks import is_near_duplicate
from hyperlora.pipelines.pair_to_lora import ImageSourcePair, PairToLora
from hyperlora.pipelines.prompt_lora import substitute_prompts
from hyperlora.prompt_blending import apply_prompt_template, combine_blends

NO_INSTRUCTION_HEAD: Final = (
    "words can be tried for networks that say words, and this one says none: leave them out"
)
MAX_UNEXPLAINED: Final = 0.2
"""What leaves no more than this share of the error without words needs no others."""
MAX_ERROR_VS_INSTRUCTION: Final = 0.8
"""Other words are said if they leave no more than this share of what is left by those that the network says, ..."""
MAX_ERROR_VS_EMPTY: Final = 0.5
"""... and no more than this of the error without any. Seen edits of validation people then keep theirs, with the
bundle's base, which says the sample behind nothing but noise; others may need other shares."""
_TIMESTEP_FRACTION: Final = 0.999
"""The place among the timesteps, from 0 to 1, where the base is asked: where nothing but the words tells what to do."""
_NUM_COMBINATIONS: Final = 4
"""So many of the words that are nearest alone are tried with what the network says."""
_EDIT_REGION_WEIGHT: Final = 4.0
"""How much more a place counts that changes."""
_BATCH_SIZE: Final = 16
"""Pictures in one pass of the base."""


def generate_with_search(
    model: PairToLora,
    base: DiffusionBase,
    pairs: ImageSourcePair | Sequence[ImageSourcePair],
    strength: float = 1.0,
    candidate_prompts: Sequence[str] | None = None,
) -> LoraWeights:
    """What ``model(pairs, strength)`` is, with words tried (``search_pair_lora``); raises what these raise."""
    pair_pixels = model.preprocess_pairs(
        pairs, strength, max(base.resolution, model.encoder.image_size)
    )
    weights = search_pair_lora(model, base, pair_pixels, candidate_prompts)
    return weights * abs(strength) if abs(strength) != 1 else weights


@torch.no_grad()
def search_pair_lora(
    model: PairToLora,
    base: DiffusionBase,
    pairs: Tensor,
    candidate_prompts: Sequence[str] | None = None,
) -> LoraWeights:
    """The model's LoRA (no batch axis) of pairs that show one edit, [pairs, 2, 3, h, w] in [0, 1], of the base's size
    or larger; but if the words it says do not explain the change, and one of ``candidate_prompts`` (those of its vocabulary, if
    not given) does, alone or with them, then it says that. So for the way back.

    With none ``candidate_prompts``, or of pairs that show no change, it is the model's. SDXL's pooled text is tried too, though
    no LoRA says it. Raises ``InvalidArgumentError`` for ``candidate_prompts`` words and a network without any, and for a base that edits
    nothing.
    """
    before, after = (model.encoder(pairs[None, :, side]) for side in (0, 1))
    candidates = model.zero_shot_prompts if candidate_prompts is None else candidate_prompts
    if not candidates or all(is_near_duplicate(*pair) for pair in pairs):
        return model.generate_from_features(before, after)[0]
    if model.network.instruction_head is None:
        raise InvalidArgumentError(NO_INSTRUCTION_HEAD)
    check_edit_base(base)
    instruction, undo_instruction = (
        model.network.predict_instructions(before, after)[0],
        model.network.predict_instructions(after, before)[0],
    )
    before_latents, after_latents = (
        base.encode_images(_resize_images(pairs[:, side], base.resolution)) for side in (0, 1)
    )
    prompt_cache: PromptCache = {}
    best_instruction, best_undo_instruction = (
        _select_instruction(
            base, before_latents, after_latents, instruction, candidates, prompt_cache
        ),
        _select_instruction(
            base, after_latents, before_latents, undo_instruction, candidates, prompt_cache
        ),
    )
    lora = model.network(before, after)
    if (best_instruction, best_undo_instruction) != (instruction, undo_instruction):
        undo_template = model.network.instruction_head.vocabulary.undo_template
        lora = substitute_prompts(
            base,
            [
                combine_blends(
                    {best_instruction: 1.0}
                    | (
                        {apply_prompt_template(best_undo_instruction, undo_template): -1.0}
                        if undo_template
                        else {}
                    )
                )
            ],
            lora,
        )
    return model.apply_strength(lora)[0]


def _select_instruction(
    base: DiffusionBase,
    before: Tensor,
    after: Tensor,
    instruction: str,
    candidates: Sequence[str],
    cache: PromptCache,
) -> str:
    """``instruction``, or what explains the change better: latents [pairs, c, h, w]; ``cache`` texts are not read again."""
    empty_error, instruction_error = _compute_instruction_errors(
        base, before, after, ["", instruction], cache
    )
    if instruction_error <= MAX_UNEXPLAINED * empty_error:
        return instruction
    candidate_errors = _compute_instruction_errors(base, before, after, candidates, cache)
    combinations = [
        combine_blends({instruction: 1.0} | {candidates[i]: 1.0})
        for i in candidate_errors.argsort()[:_NUM_COMBINATIONS].tolist()
    ]
    options, errors = (
        [*candidates, *combinations],
        torch.cat(
            [
                candidate_errors,
                _compute_instruction_errors(base, before, after, combinations, cache),
            ]
        ),
    )
    best_index = int(errors.argmin())
    return (
        options[best_index]
        if errors[best_index]
        < min(MAX_ERROR_VS_INSTRUCTION * instruction_error, MAX_ERROR_VS_EMPTY * empty_error)
        else instruction
    )


def _compute_instruction_errors(
    base: DiffusionBase,
    before: Tensor,
    after: Tensor,
    instructions: Sequence[str],
    cache: PromptCache,
) -> Tensor:
    """[texts]: how far the base is off A' that is told each, by the same noise."""
    noise = torch.randn(after.shape, generator=torch.Generator().manual_seed(0)).to(after)
    region_weights = compute_edit_region_weights(before, after, _EDIT_REGION_WEIGHT)
    cond_latents = (
        before / base.pipeline.vae.config.scaling_factor
    )  # as diffusers' pipeline shows it
    items = [(text, pair_indices) for text in instructions for pair_indices in range(len(after))]
    losses = []
    for batch in (items[i : i + _BATCH_SIZE] for i in range(0, len(items), _BATCH_SIZE)):
        pair_indices = [pair_indices for _, pair_indices in batch]
        u = torch.full((len(pair_indices),), _TIMESTEP_FRACTION, device=after.device)
        losses.append(
            compute_denoising_loss(
                base.denoiser,
                base.noise_scheduler,
                after[pair_indices],
                noise_sample=(u, noise[pair_indices]),
                weight=region_weights[pair_indices],
                cond_latents=cond_latents[pair_indices],
                **base.encode_prompts([text for text, _ in batch], cache),
            )
        )
    return torch.cat(losses).view(len(instructions), len(after)).mean(1)


def _resize_images(images: Tensor, size: int) -> Tensor:
    return images if images.shape[-1] == size else F.interpolate(images, (size, size), mode="area")
