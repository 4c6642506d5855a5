"""Words that a network never learned to say: the base tries them on the pair, and what explains it best is said.

How well words explain a pair is told by the error that the base makes when it is to find A' behind noise, sees A beside
it and is told them: a diffusion model is a classifier (Li et al., 2303.16203).
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.diffusion.diffusion_base import Base, Texts
from hyperlora.diffusion.image_editing import require_editing
from hyperlora.diffusion.losses import denoising_loss, edit_weight
from hyperlora.errors import BadRequest
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.input_checks import is_unchanged
from hyperlora.pipelines.pair_to_lora import PairToLora, SourcePair
from hyperlora.pipelines.prompt_lora import saying
from hyperlora.prompt_blending import reworded, told

NO_WORDS: Final = "words can be tried for networks that say words, and this one says none: leave them out"
EXPLAINED: Final = 0.2
"""What leaves no more than this share of the error without words needs no others."""
BETTER: Final = 0.8
"""Other words are said if they leave no more than this share of what is left by those that the network says, ..."""
GOOD: Final = 0.5
"""... and no more than this of the error without any. Seen edits of validation people then keep theirs, with the
bundle's base, which says the sample behind nothing but noise; others may need other shares."""
_BEHIND: Final = 0.999
"""The place among the timesteps, from 0 to 1, where the base is asked: where nothing but the words tells what to do."""
_BESIDES: Final = 4
"""So many of the words that are nearest alone are tried with what the network says."""
_WEIGHT: Final = 4.0
"""How much more a place counts that changes."""
_AT_ONCE: Final = 16
"""Pictures in one pass of the base."""


def tried(
    model: PairToLora,
    base: Base,
    pairs: SourcePair | Sequence[SourcePair],
    strength: float = 1.0,
    further: Sequence[str] | None = None,
) -> LoraWeights:
    """What ``model(pairs, strength)`` is, with words tried (``lora_of_pairs``); raises what these raise."""
    shown = model.shown(pairs, strength, max(base.resolution, model.encoder.image_size))
    weights = lora_of_pairs(model, base, shown, further)
    return weights * abs(strength) if abs(strength) != 1 else weights


@torch.no_grad()
def lora_of_pairs(model: PairToLora, base: Base, pairs: Tensor, further: Sequence[str] | None = None) -> LoraWeights:
    """The model's LoRA (no batch axis) of pairs that show one edit, [pairs, 2, 3, h, w] in [0, 1], of the base's size
    or larger; but if the words it says do not explain the change, and one of ``further`` (those of its vocabulary, if
    not given) does, alone or with them, then it says that. So for the way back.

    With none ``further``, or of pairs that show no change, it is the model's. SDXL's pooled text is tried too, though
    no LoRA says it. Raises ``BadRequest`` for ``further`` words and a network without any, and for a base that edits
    nothing.
    """
    before, after = (model.encoder(pairs[None, :, side]) for side in (0, 1))
    words = model.further if further is None else further
    if not words or all(is_unchanged(*pair) for pair in pairs):
        return model.from_features(before, after)[0]
    if model.network.wording is None:
        raise BadRequest(NO_WORDS)
    require_editing(base)
    there, back = model.network.instructions(before, after)[0], model.network.instructions(after, before)[0]
    a, b = (base.encode_images(_sized(pairs[:, side], base.resolution)) for side in (0, 1))
    texts: Texts = {}
    found, found_back = _explaining(base, a, b, there, words, texts), _explaining(base, b, a, back, words, texts)
    lora = model.network(before, after)
    if (found, found_back) != (there, back):
        pattern = model.network.wording.vocabulary.back
        lora = saying(base, [told({found: 1.0} | ({reworded(found_back, pattern): -1.0} if pattern else {}))], lora)
    return model.strong(lora)[0]


def _explaining(base: Base, before: Tensor, after: Tensor, said: str, words: Sequence[str], known: Texts) -> str:
    """``said``, or what explains the change better: latents [pairs, c, h, w]; ``known`` texts are not read again."""
    nothing, left = _errors(base, before, after, ["", said], known)
    if left <= EXPLAINED * nothing:
        return said
    alone = _errors(base, before, after, words, known)
    beside = [told({said: 1.0} | {words[i]: 1.0}) for i in alone.argsort()[:_BESIDES].tolist()]
    others, errors = [*words, *beside], torch.cat([alone, _errors(base, before, after, beside, known)])
    best = int(errors.argmin())
    return others[best] if errors[best] < min(BETTER * left, GOOD * nothing) else said


def _errors(base: Base, before: Tensor, after: Tensor, texts: Sequence[str], known: Texts) -> Tensor:
    """[texts]: how far the base is off A' that is told each, by the same noise."""
    noise = torch.randn(after.shape, generator=torch.Generator().manual_seed(0)).to(after)
    weight = edit_weight(before, after, _WEIGHT)
    beside = before / base.pipeline.vae.config.scaling_factor  # as diffusers' pipeline shows it
    each = [(text, pair) for text in texts for pair in range(len(after))]
    parts = []
    for some in (each[i : i + _AT_ONCE] for i in range(0, len(each), _AT_ONCE)):
        pair = [pair for _, pair in some]
        place = torch.full((len(pair),), _BEHIND, device=after.device)
        parts.append(
            denoising_loss(
                base.denoiser, base.noise_schedule, after[pair], draw=(place, noise[pair]), weight=weight[pair],
                beside=beside[pair], **base.encode_prompts([text for text, _ in some], known),
            )
        )  # fmt: skip
    return torch.cat(parts).view(len(texts), len(after)).mean(1)


def _sized(pictures: Tensor, size: int) -> Tensor:
    return pictures if pictures.shape[-1] == size else F.interpolate(pictures, (size, size), mode="area")
