"""The autoencoder of LoRAs, the mixture of features, the denoiser."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.image_feature_mixer import MixedImageFeatures
from hyperlora.models.lora_autoencoder import (
    LoraAutoencoder,
    compute_weight_preserved_loss,
    make_rank_major_permutation,
)
from hyperlora.models.lora_dit import LoraDiT, interpolate_noise
from hyperlora.models.lora_pca import FactorwiseLoraPCA, LoraPCA, compute_principal_components

LAYOUT = LoraLayout(
    (
        TargetModule("unet.a", 24, 40),
        TargetModule("unet.b", 6, 8),
        TargetModule("unet.c", 36, 16, (3, 3)),
    ),
    2,
    "tiny",
)


def seen(batch=3, views=2, tokens=5, width=12):
    return ImageFeatures(torch.randn(batch, views, tokens, width))


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
)
def test_the_order_keeps_every_number_once(rank, shapes):
    layout = LoraLayout(
        tuple(TargetModule(f"unet.s{i}", *shape) for i, shape in enumerate(shapes)), rank, "tiny"
    )
    assert make_rank_major_permutation(layout).sort().values.tolist() == list(range(layout.numel))


def test_factors_of_one_direction_are_neighbours():
    weights = LoraWeights.unflatten(LAYOUT, torch.randn(LAYOUT.numel))
    line = weights.flatten()[make_rank_major_permutation(LAYOUT)]
    site = LAYOUT.targets[0]
    row, column = (
        line[: site.in_features],
        line[site.in_features : site.in_features + site.out_features],
    )
    assert torch.equal(row, weights.down[0][0]) and torch.equal(column, weights.up[0][:, 0])


@pytest.mark.parametrize("variational", [False, True])
def test_autoencoder_learns_a_few_loras(variational):
    torch.manual_seed(0)
    rows = torch.randn(8, 3) @ torch.randn(3, LAYOUT.numel) / 3**0.5
    model = LoraAutoencoder(LAYOUT, (8, 16), latent_width=8, variational=variational)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        made, divergence = model(rows)
        (compute_weight_preserved_loss(made, rows, 1.0) + 1e-4 * divergence.mean()).backward()
        optimizer.step()
    model.eval()
    assert model.encode(rows).shape == (8, model.num_tokens, 8)
    assert (model(rows)[0] - rows).square().mean() < 0.1 * rows.square().mean()


def test_principal_components_keep_what_lies_in_them():
    torch.manual_seed(0)
    rows = torch.randn(20, 4) @ torch.randn(4, LAYOUT.numel)
    for model in (
        LoraPCA(LAYOUT, num_tokens=2, latent_width=3),
        FactorwiseLoraPCA(LAYOUT, 2, 3, components_per_factor=5),
    ):
        model.fit(rows[:10])
        assert model.encode(rows).shape == (20, 2, 3)
        torch.testing.assert_close(
            model.decode(model.encode(rows[10:])), rows[10:], rtol=1e-3, atol=1e-3
        )
        assert model.compression == LAYOUT.numel / 6


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 8))
def test_directions_are_those_of_the_singular_value_decomposition(n, width, count):
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(n * 13 + width))
    found = compute_principal_components(rows, count)
    values, exact = torch.linalg.svd(rows, full_matrices=False)[1:]
    kept = min(count, int((values > 1e-3 * values[0]).sum()))
    torch.testing.assert_close(
        rows @ found.mT @ found, rows @ exact[:kept].mT @ exact[:kept], rtol=1e-2, atol=1e-2
    )


def test_large_numbers_count_more():
    wanted = torch.tensor([[1.0, 0.1]])
    far, near = torch.tensor([[1.1, 0.1]]), torch.tensor([[1.0, 0.2]])
    assert compute_weight_preserved_loss(far, wanted, 0.0).allclose(
        compute_weight_preserved_loss(near, wanted, 0.0)
    )
    assert compute_weight_preserved_loss(far, wanted, 2.0) > 2 * compute_weight_preserved_loss(
        near, wanted, 2.0
    )


def test_mixture_hears_both_or_one():
    face, image = seen(tokens=1, width=6), seen()
    other_face, other_image = seen(tokens=1, width=6), seen()
    for mode, hears in {"gate": (1, 1), "average": (1, 1), "face": (1, 0), "image": (0, 1)}.items():
        torch.manual_seed(1)
        model = MixedImageFeatures(6, 12, width=8, num_tokens=4, num_heads=2, mode=mode)
        told, gate = model.forward_with_gate(face, image)
        assert told.tokens.shape == gate.shape == (3, 2, 4, 8)
        changed = [
            not torch.equal(told.tokens, model(*b).tokens)
            for b in ((other_face, image), (face, other_image))
        ]
        assert changed == [bool(h) for h in hears]
    with pytest.raises(InvalidArgumentError, match="known: gate, average, face, image"):
        MixedImageFeatures(6, 12, mode="both")


def test_denoiser_begins_at_zero_and_learns_whose_latents():
    torch.manual_seed(0)
    x, photos = torch.randn(4, 6, 3), seen(4, 1)
    model = LoraDiT(6, 3, 12, width=32, depth=2, num_heads=2)
    assert model(x, torch.rand(4), photos).abs().max() == 0
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        t, dropped = torch.rand(4), torch.rand(4) < 0.1
        (
            model(interpolate_noise(torch.randn_like(x), x, t), t, photos, dropped) - x
        ).square().mean().backward()
        optimizer.step()
    made = model.sample(photos, torch.randn_like(x), num_inference_steps=10)
    near = torch.cdist(made.flatten(1), x.flatten(1)).argmin(1)
    assert near.tolist() == [0, 1, 2, 3]
    noise = torch.randn_like(x)
    guided = model.sample(photos, noise, num_inference_steps=4, guidance_scale=1.0000001)
    assert torch.allclose(guided, model.sample(photos, noise, num_inference_steps=4), atol=1e-4)
