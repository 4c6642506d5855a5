"""``TextSubstitution`` against the real thing: the denoiser told the words themselves."""

import pytest
import torch
from torch import Tensor, nn

from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.text_substitution import TextSubstitution
from hyperlora.lora.weights import LoraWeights

TOKENS, WIDTH = 5, 16


def word_sites(
    unet: nn.Module, rank: int, empty: Tensor, preset: str = "attention+mlp"
) -> TextSubstitution:
    sites = TextSubstitution(make_layout({"unet": unet}, preset, rank, "tiny"), TOKENS, WIDTH)
    layers = dict(unet.named_modules())
    sites.set_base(empty, [layers[site.path].weight for site in sites.targets])
    return sites


def nothing_else(sites: TextSubstitution, *batch: int) -> LoraWeights:
    return LoraWeights.zeros(sites.other_layout, batch)


@pytest.fixture
def texts() -> tuple[Tensor, Tensor]:
    """The empty text [tokens, width], and two others [2, tokens, width] that differ from it in two tokens."""
    generator = torch.Generator().manual_seed(3)
    empty = torch.randn(TOKENS, WIDTH, generator=generator)
    words = empty.repeat(2, 1, 1)
    words[:, 1:3] += torch.randn(2, 2, WIDTH, generator=generator)
    return empty, words


@torch.no_grad()
def test_an_empty_text_with_the_lora_is_as_the_words_without(
    unet: nn.Module, texts: tuple[Tensor, Tensor]
) -> None:
    empty, words = texts
    sites = word_sites(unet, 2, empty)
    lora = sites(*sites.factorize(words - empty), nothing_else(sites, 2))
    assert lora.layout == sites.layout
    latents, steps = torch.randn(2, 4, 8, 8), torch.tensor([7, 700])
    told = unet(latents, steps, words).sample
    with inject_lora(unet, lora):
        made = unet(latents, steps, empty.expand(2, -1, -1)).sample
    plain = unet(latents, steps, empty.expand(2, -1, -1)).sample
    assert (made - told).abs().max() < 1e-3 * (plain - told).abs().max()


def test_too_low_a_rank_says_what_it_can(unet: nn.Module, texts: tuple[Tensor, Tensor]) -> None:
    empty, words = texts
    errors = []
    for rank in (1, 2, 9):  # the last is more than there are tokens
        a, b = word_sites(unet, rank, empty).factorize(words - empty)
        assert a.shape == (2, TOKENS, rank) and b.shape == (2, rank, WIDTH)
        errors.append((a @ b - (words - empty)).square().sum((1, 2)))
    silent = (words - empty).square().sum((1, 2))
    assert all((error < 1e-6 * silent).all() for error in errors[1:])
    assert (errors[1] < errors[0]).all() and (errors[0] < silent).all()


def test_other_sites_keep_what_they_are_given(
    unet: nn.Module, texts: tuple[Tensor, Tensor]
) -> None:
    sites = word_sites(unet, 2, texts[0])
    generator = torch.Generator().manual_seed(1)
    rest = LoraWeights.unflatten(
        sites.other_layout, torch.randn(3, sites.other_layout.numel, generator=generator)
    )
    lora = sites(torch.zeros(3, TOKENS, 2), torch.zeros(3, 2, WIDTH), rest)
    assert len(sites.targets) + len(rest.layout.targets) == len(lora.layout.sites)
    kept = [i for i in range(len(lora.layout.sites)) if i not in sites.target_indices]
    assert all(torch.equal(lora.up[i], up) for i, up in zip(kept, rest.up, strict=True))
    assert all(lora.up[i].abs().max() == 0 for i in sites.target_indices)


def test_words_may_be_told_in_a_basis(unet: nn.Module, texts: tuple[Tensor, Tensor]) -> None:
    empty, _ = texts
    whole = word_sites(unet, 3, empty)
    layers, basis = dict(unet.named_modules()), torch.linalg.qr(torch.randn(WIDTH, 4)).Q.mT
    narrow = TextSubstitution(whole.layout, TOKENS, WIDTH, basis_size=4)
    narrow.set_base(empty, [layers[site.path].weight for site in narrow.targets], basis)
    a, b = torch.randn(2, TOKENS, 3), torch.randn(2, 3, 4)
    for one, other in zip(
        narrow(a, b, nothing_else(narrow, 2)).delta(),
        whole(a, b @ basis, nothing_else(whole, 2)).delta(),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_layout_without_text_is_refused() -> None:
    layout = LoraLayout((TargetModule("unet.conv", 16, 8),), 2, "tiny")
    with pytest.raises(InvalidArgumentError, match="no site of the layout reads text of width 16"):
        TextSubstitution(layout, TOKENS, WIDTH)


def test_other_sites_may_be_of_lower_rank(unet: nn.Module, texts: tuple[Tensor, Tensor]) -> None:
    layout = make_layout({"unet": unet}, "attention+mlp", 3, "tiny")
    sites = TextSubstitution(layout, TOKENS, WIDTH, other_rank=2)
    assert sites.other_layout.rank == 2
    rest = LoraWeights.unflatten(sites.other_layout, torch.randn(4, sites.other_layout.numel))
    lora = sites(torch.zeros(4, TOKENS, 3), torch.zeros(4, 3, WIDTH), rest)
    assert lora.layout == layout
    kept = [delta for i, delta in enumerate(lora.delta()) if i not in sites.target_indices]
    torch.testing.assert_close(kept, list(rest.get_delta_weights()))
    with pytest.raises(InvalidArgumentError, match="cannot be of rank 4: the whole LoRA is of 3"):
        TextSubstitution(layout, TOKENS, WIDTH, other_rank=4)
