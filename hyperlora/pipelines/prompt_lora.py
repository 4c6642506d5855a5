"""Words as a LoRA: what a base does when it is told something, as a file that does it when nothing is said."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.lora.text_substitution import TextSubstitution
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.pair_hypernetwork import PairHypernetwork


def encode_text(base: DiffusionBase, prompts: Sequence[str]) -> Tensor:
    """What the denoiser reads of each text, [n, tokens, width] in float32: tokens of a text differ by little."""
    with torch.autocast(base.pipeline.device.type, enabled=False):
        return base.encode_prompts(list(prompts))["encoder_hidden_states"].float()


def set_substitution_base(
    substitution: TextSubstitution, base: DiffusionBase, basis: Tensor | None = None
) -> None:
    """Tell ``substitution`` the weights and the empty text of the base that they are of, and the basis of their words."""
    layers = dict(base.denoiser.named_modules())
    substitution.set_base(
        encode_text(base, [""])[0],
        [layers[site.path].weight for site in substitution.targets],
        basis,
    )


def set_instruction_texts(network: PairHypernetwork, base: DiffusionBase) -> None:
    """Tell a network with ``words`` all that it needs to know of the base; others need nothing."""
    if network.text_substitution is None or network.instruction_head is None:
        return
    vocabulary = network.instruction_head.vocabulary
    text_embeds = encode_text(base, ["", *vocabulary.prompts, *vocabulary.undo_prompts])
    set_substitution_base(
        network.text_substitution,
        base,
        network.instruction_head.set_text_embeddings(text_embeds[1:] - text_embeds[0]),
    )


def make_lora_from_prompts(
    base: DiffusionBase, prompts: Sequence[str], rank: int = 4, preset: str = "attention"
) -> LoraWeights:
    """One LoRA per text, found in closed form: with it, the denoiser reads the empty text as it reads that text without
    (``TextSubstitution``), as nearly as ``rank`` allows.

    Raises ``InvalidArgumentError`` if nothing of the preset reads text. SDXL's pooled text is not said by any site.
    """
    component = next(iter(base.modules))
    layout = make_layout({component: base.denoiser}, preset, rank, base.id)
    return substitute_prompts(base, prompts, LoraWeights.zeros(layout, (len(prompts),)))


@torch.no_grad()
def substitute_prompts(
    base: DiffusionBase, prompts: Sequence[str], loras: LoraWeights
) -> LoraWeights:
    """``measure_lora_throughput``, one per text, that say these texts instead of what they say at the sites that read text."""
    text_embeds = encode_text(base, ["", *prompts])
    substitution = TextSubstitution(loras.layout, *text_embeds.shape[1:]).to(text_embeds.device)
    set_substitution_base(substitution, base)
    other_indices = [
        i for i in range(len(loras.layout.targets)) if i not in substitution.target_indices
    ]
    other_loras = LoraWeights(
        substitution.other_layout,
        tuple(loras.down[i] for i in other_indices),
        tuple(loras.up[i] for i in other_indices),
    )
    substituted_loras = substitution(
        *substitution.factorize(text_embeds[1:] - text_embeds[0]),
        other_loras.apply(lambda numbers: numbers.to(text_embeds.device)),
    )
    return substituted_loras.map(lambda numbers: numbers.to(loras.down[0]))
