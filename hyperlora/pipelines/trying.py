"""Words that a network never learned to say: the base tries them on the pair, and what explains it best is said.

How well words explain a pair is told by the error that the base makes when it is to find A' behind noise, sees A beside
it and is told them: a diffusion model is a classifier (Li et al., 2303.16203).
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.blends import reworded, told
from hyperlora.lora import LoraWeights
from hyperlora.objectives import denoising_loss, edit_weight
from hyperlora.pipelines.bases import Base
from hyperlora.pipelines.pair_to_lora import PairToLora, SourcePair
from hyperlora.pipelines.wording import saying

EXPLAINED: Final = 0.2
"""What leaves no more than this share of the error without words needs no others."""
BETTER: Final = 0.8
"""Other words are said if they leave no more than this share of what is left by those that the network says, ..."""
GOOD: Final = 0.5
"""... and no more than this of the error without any. Chosen so that seen edits of validation people keep theirs."""
_BEHIND: Final = 0.999
"""The place among the timesteps, from 0 to 1, where the base is asked: where nothing but the words tells what to do."""
_BESIDES: Final = 4
"""So many of the words that are nearest alone are tried with what the network says."""
_WEIGHT: Final = 4.0
"""How much more a place counts that changes."""


def tried(
    model: PairToLora,
    base: Base,
    pairs: SourcePair | Sequence[SourcePair],
    strength: float = 1.0,
    further: Sequence[str] | None = None,
) -> LoraWeights:
    """What ``model(pairs, strength)`` is, with words tried (``lora_of_pairs``); raises what that raises."""
    weights = lora_of_pairs(model, base, model.shown(pairs, strength), further)
    return weights * abs(strength) if abs(strength) != 1 else weights


@torch.no_grad()
def lora_of_pairs(model: PairToLora, base: Base, pairs: Tensor, further: Sequence[str] | None = None) -> LoraWeights:
    """The model's LoRA (no batch axis) of pairs that show one edit, [pairs, 2, 3, h, w] in [0, 1]; but if the words it
    says do not explain the change, and one of ``further`` (those of its vocabulary, if not given) does, alone or with
    them, then it says that. So for the way back.

    With none ``further`` it is the model's. Raises ``BadRequest`` for ``further`` words and a network without any.
    """
    before, after = (model.encoder(pairs[None, :, side]) for side in (0, 1))
    lora = model.from_features(before, after)[0]
    if not (words := model.further if further is None else further):
        return lora
    there, back = model.network.instructions(before, after)[0], model.network.instructions(after, before)[0]
    a, b = (base.encode_images(_sized(pairs[:, side], base.resolution)) for side in (0, 1))
    found, found_back = _explaining(base, a, b, there, words), _explaining(base, b, a, back, words)
    if (found, found_back) == (there, back):
        return lora
    asked = {found: 1.0}
    if model.network.wording and (pattern := model.network.wording.vocabulary.back):
        asked[reworded(found_back, pattern)] = -1.0
    return saying(base, [told(asked)], LoraWeights.stack([lora]))[0]


def _explaining(base: Base, before: Tensor, after: Tensor, said: str, words: Sequence[str]) -> str:
    """``said``, or what explains the change better: latents [pairs, c, h, w]."""
    nothing, left = _errors(base, before, after, ["", said])
    if left <= EXPLAINED * nothing:
        return said
    alone = _errors(base, before, after, words)
    nearest = [words[i] for i in alone.argsort()[:_BESIDES].tolist()]
    beside = [told({said: 1.0, word: 1.0, "": -1.0}) for word in nearest]
    others, errors = [*words, *beside], torch.cat([alone, _errors(base, before, after, beside)])
    best = int(errors.argmin())
    return others[best] if errors[best] < min(BETTER * left, GOOD * nothing) else said


def _errors(base: Base, before: Tensor, after: Tensor, texts: Sequence[str]) -> Tensor:
    """[texts]: how far the base is off A' that is told each, by the same noise."""
    n, each = len(texts), len(before)
    noise = torch.randn(after.shape, generator=torch.Generator().manual_seed(0)).to(after)
    a, b, noise = (x.repeat(n, 1, 1, 1) for x in (before, after, noise))
    conditions = base.encode_prompts([text for text in texts for _ in range(each)])
    place = torch.full((n * each,), _BEHIND, device=after.device)
    weight = edit_weight(a, b, _WEIGHT)
    beside = a / base.pipeline.vae.config.scaling_factor
    loss = denoising_loss(
        base.denoiser, base.noise_schedule, b, draw=(place, noise), weight=weight, beside=beside, **conditions
    )
    return loss.view(n, each).mean(1)


def _sized(pictures: Tensor, size: int) -> Tensor:
    return pictures if pictures.shape[-1] == size else F.interpolate(pictures, (size, size), mode="area")
