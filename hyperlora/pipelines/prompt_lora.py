"""Prompts as LoRAs, in closed form: with the LoRA, the empty prompt acts as the prompt."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hyperlora.compute import disable_autocast
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.lora.text_substitution import TextSubstitution
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.pair_hypernetwork import PairHypernetwork


def encode_text(base: DiffusionBase, prompts: Sequence[str]) -> Tensor:
    """Encode prompts as the denoiser's cross-attention reads them.

    Args:
        base: The base with the text encoder.
        prompts: The prompts, which may be blends.

    Returns:
        [n, tokens, width] in float32, since the tokens of a prompt differ by little.
    """
    with disable_autocast(base.device):
        return base.encode_prompts(list(prompts))["prompt_embeds"].float()


def set_substitution_base(
    substitution: TextSubstitution, base: DiffusionBase, basis: Tensor | None = None
) -> None:
    """Store what a text substitution needs of its base.

    Args:
        substitution: The module that receives the weights of its layers and the empty prompt.
        base: The base whose denoiser the layers belong to.
        basis: Orthonormal directions [basis_size, width] of the text offsets; None for the
            embeddings themselves.
    """
    empty_prompt_embeds = encode_text(base, [""])[0]  # [tokens, width]
    layers = [base.denoiser.get_submodule(target.path) for target in substitution.targets]
    weights = [_read_weight(layer, base.device) for layer in layers]  # [out, width] each
    substitution.set_base(empty_prompt_embeds, weights, basis)


def set_instruction_texts(network: PairHypernetwork, base: DiffusionBase) -> None:
    """Store what a network with an instruction head needs of its base; others need nothing.

    Args:
        network: The network; it receives the text embeddings of its vocabulary's prompts.
        base: The base of its LoRAs.
    """
    if network.text_substitution is None or network.instruction_head is None:
        return
    vocabulary = network.instruction_head.vocabulary
    text_embeds = encode_text(base, ["", *vocabulary.prompts, *vocabulary.undo_prompts])
    text_offsets = text_embeds[1:] - text_embeds[0]  # e(p) - e(∅), [prompts, tokens, width]
    basis = network.instruction_head.set_text_embeddings(text_offsets)
    set_substitution_base(network.text_substitution, base, basis)


def make_lora_from_prompts(
    base: DiffusionBase, prompts: Sequence[str], rank: int = 4, preset: str = "attention"
) -> LoraWeights:
    """Make LoRAs in closed form that let the empty prompt act as a prompt (``TextSubstitution``).

    SDXL's pooled text embedding is out of reach, as no target reads it.

    Args:
        base: The base of the LoRAs.
        prompts: One prompt per LoRA, which may be a blend.
        rank: The rank; a higher one comes nearer to the prompt.
        preset: The target modules; see ``DiffusionBase.make_layout``.

    Returns:
        One LoRA per prompt (batch axis).

    Raises:
        InvalidArgumentError: No target module of the preset reads text.
    """
    layout = base.make_layout(preset, rank)
    return substitute_prompts(base, prompts, LoraWeights.zeros(layout, (len(prompts),)))


@torch.no_grad()
def substitute_prompts(
    base: DiffusionBase, prompts: Sequence[str], loras: LoraWeights
) -> LoraWeights:
    """Replace what LoRAs do to the text projections by closed-form LoRAs of prompts.

    Args:
        base: The base of the LoRAs.
        prompts: One prompt per LoRA, which may be a blend.
        loras: The LoRAs (batch axis), which keep their weights at all other targets.

    Returns:
        One LoRA per prompt (batch axis).

    Raises:
        InvalidArgumentError: No target of the LoRAs reads text.
    """
    text_embeds = encode_text(base, ["", *prompts])
    text_offsets = text_embeds[1:] - text_embeds[0]  # e(p) - e(∅), [prompts, tokens, width]
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
        *substitution.factorize(text_offsets),
        other_loras.to(text_embeds.device),
    )
    return substituted_loras.to(loras.device, loras.down[0].dtype)


def _read_weight(layer: nn.Module, device: torch.device) -> Tensor:
    """Read the weight of a layer, whose module may hold none while it is offloaded."""
    from accelerate.utils import align_module_device

    with align_module_device(layer):
        weight: Tensor = layer.get_parameter("weight").to(device, torch.float32)
    return weight
