"""Words as a LoRA: what a base does when it is told something, as a file that does it when nothing is said."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperlora.diffusion.diffusion_base import Base
from hyperlora.diffusion.target_modules import layout_of
from hyperlora.lora.text_substitution import WordSites
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.pair_hypernetwork import ChangeNetwork


def text_of(base: Base, texts: Sequence[str]) -> Tensor:
    """What the denoiser reads of each text, [n, tokens, width] in float32: tokens of a text differ by little."""
    with torch.autocast(base.pipeline.device.type, enabled=False):
        return base.encode_prompts(list(texts))["encoder_hidden_states"].float()


def learn_sites(sites: WordSites, base: Base, basis: Tensor | None = None) -> None:
    """Tell ``sites`` the weights and the empty text of the base that they are of, and the basis of their words."""
    layers = dict(base.denoiser.named_modules())
    sites.learn(text_of(base, [""])[0], [layers[site.path].weight for site in sites.sites], basis)


def learn_words(network: ChangeNetwork, base: Base) -> None:
    """Tell a network with ``words`` all that it needs to know of the base; others need nothing."""
    if network.sites is None or network.wording is None:
        return
    vocabulary = network.wording.vocabulary
    said = text_of(base, ["", *vocabulary.prompts, *vocabulary.ways_back])
    learn_sites(network.sites, base, network.wording.learn(said[1:] - said[0]))


def lora_of_words(base: Base, texts: Sequence[str], rank: int = 4, preset: str = "attention") -> LoraWeights:
    """One LoRA per text, found in closed form: with it, the denoiser reads the empty text as it reads that text without
    (``WordSites``), as nearly as ``rank`` allows.

    Raises ``BadRequest`` if nothing of the preset reads text. SDXL's pooled text is not said by any site.
    """
    component = next(iter(base.modules))
    layout = layout_of({component: base.denoiser}, preset, rank, base.id)
    return saying(base, texts, LoraWeights.zeros(layout, (len(texts),)))


@torch.no_grad()
def saying(base: Base, texts: Sequence[str], loras: LoraWeights) -> LoraWeights:
    """``loras``, one per text, that say these texts instead of what they say at the sites that read text."""
    said = text_of(base, ["", *texts])
    sites = WordSites(loras.layout, *said.shape[1:]).to(said.device)
    learn_sites(sites, base)
    others = [i for i in range(len(loras.layout.sites)) if i not in sites.places]
    rest = LoraWeights(sites.others, tuple(loras.down[i] for i in others), tuple(loras.up[i] for i in others))
    said_too = sites(*sites.nearest(said[1:] - said[0]), rest.map(lambda numbers: numbers.to(said.device)))
    return said_too.map(lambda numbers: numbers.to(loras.down[0]))
