"""The convolutional autoencoder of LoRAs: its start, what it learns, and its loss."""

import pytest
import torch
from torch import Tensor

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.models.lora_autoencoder import (
    LoraAutoencoder,
    compute_weight_preserved_loss,
)
from hyperlora.models.lora_pca import FactorwiseLoraPCA, complete_basis
from hyperlora.models.lora_projections import FactorProjection, list_factor_kinds

LAYOUT = LoraLayout(
    (
        TargetModule("unet.blocks.0.a", 24, 40),
        TargetModule("unet.blocks.1.a", 24, 40),
        TargetModule("unet.b", 6, 8),
        TargetModule("unet.c", 36, 16, (3, 3)),
        TargetModule("unet.d", 30, 10),
    ),
    2,
    "tiny",
)
SIZES = {"directions_per_factor": 6, "factors_per_token": 4, "latent_width": 12, "width": 16}


def make_rows(num_rows: int, num_directions: int = 3) -> Tensor:
    """Draw LoRAs of mean 0 in a few directions."""
    torch.manual_seed(0)
    rows = torch.randn(num_rows, num_directions) @ torch.randn(num_directions, LAYOUT.numel)
    return (rows - rows.mean(0)) / num_directions**0.5


def compute_relative_error(model: LoraAutoencoder | FactorwiseLoraPCA, rows: Tensor) -> float:
    with torch.no_grad():
        error = model.decode(model.encode(rows)) - rows
    return float(error.square().mean() / rows.square().mean())


@pytest.mark.parametrize("share_directions", [False, True])
def test_fit_starts_at_principal_components(share_directions: bool) -> None:
    rows = make_rows(30)
    model = LoraAutoencoder(LAYOUT, **SIZES, share_directions=share_directions)
    assert compute_relative_error(model, rows) > 0.3
    model.fit(rows)
    # three directions: six of each kind of factor hold them, and twelve of each token
    assert compute_relative_error(model, rows) < 1e-6


def test_fit_equals_factorwise_principal_components() -> None:
    rows = make_rows(40, 30)
    # one token of all factors: the two-step PCA
    model = LoraAutoencoder(
        LAYOUT, directions_per_factor=4, factors_per_token=10, latent_width=8, depth=1
    )
    pca = FactorwiseLoraPCA(LAYOUT, 1, 8, components_per_factor=4)
    model.fit(rows)
    pca.fit(rows)
    assert model.compression == pca.compression == LAYOUT.numel / 8
    torch.testing.assert_close(
        model.decode(model.encode(rows)), pca.decode(pca.encode(rows)), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("variational", [False, True])
@pytest.mark.parametrize("share_directions", [False, True])
def test_training_learns_what_components_miss(variational: bool, share_directions: bool) -> None:
    """Tokens of two numbers hold three directions only where neighbors help."""
    rows = make_rows(8)
    sizes = {**SIZES, "latent_width": 1, "variational": variational, "kernel_size": 3}
    model = LoraAutoencoder(LAYOUT, **sizes, share_directions=share_directions)
    model.fit(rows)
    before = compute_relative_error(model, rows)
    assert before > 0.3
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        reconstruction, divergence = model(rows)
        loss = compute_weight_preserved_loss(reconstruction, rows, 1.0) + 1e-4 * divergence.mean()
        loss.backward()
        optimizer.step()
    model.eval()
    assert model.encode(rows).shape == (8, 3, 1)
    assert all(p.grad is not None for p in model.parameters())
    assert compute_relative_error(model, rows) < before / 3


@pytest.mark.parametrize("num_rows", [2, 4, 7])
def test_complete_basis_is_orthonormal_and_keeps_what_was_found(num_rows: int) -> None:
    torch.manual_seed(0)
    found = torch.linalg.qr(torch.randn(5, 2)).Q.mT
    basis = complete_basis(torch.cat([found, torch.zeros(num_rows - 2, 5)]))
    num_directions = min(num_rows, 5)
    torch.testing.assert_close(basis[:2].abs(), found.abs())
    torch.testing.assert_close(
        basis[:num_directions] @ basis[:num_directions].mT, torch.eye(num_directions)
    )
    assert basis.shape == (num_rows, 5) and not basis[num_directions:].any()


def test_more_directions_than_numbers_lose_nothing() -> None:
    rows = make_rows(50, 40)
    model = LoraAutoencoder(LAYOUT, directions_per_factor=200, latent_width=400)
    model.fit(rows)
    assert compute_relative_error(model, rows) < 1e-6


def test_depth_0_is_linear() -> None:
    rows = make_rows(8)
    model = LoraAutoencoder(LAYOUT, **SIZES, depth=0)
    torch.testing.assert_close(model.encode(rows * 2), model.encode(rows) * 2)


def test_list_factor_kinds_joins_paths_that_differ_in_numbers() -> None:
    own, by_kind = (list_factor_kinds(LAYOUT, shared) for shared in (False, True))
    assert len(set(own)) == 10 and len(set(by_kind)) == 8
    assert by_kind[0] == by_kind[2] != by_kind[1] == by_kind[3]
    mixed = LoraLayout(
        (TargetModule("unet.0.a", 3, 4), TargetModule("unet.1.a", 5, 4)), 1, "other sizes"
    )
    assert len(set(list_factor_kinds(mixed, by_kind=True))) == 3


def test_compute_weight_preserved_loss_equals_its_formula() -> None:
    target = torch.tensor([[1.0, -0.1], [2.0, 4.0]])
    reconstruction = torch.tensor([[1.1, -0.1], [2.0, 3.0]])
    # λ = 2: weights 3 and 1.2, then 2 and 3
    expected = (3 * 0.1**2 + 3 * 1.0**2) / 4
    loss = compute_weight_preserved_loss(reconstruction, target, 2.0)
    torch.testing.assert_close(loss, torch.tensor(expected))
    plain = compute_weight_preserved_loss(reconstruction, target, 0.0)
    torch.testing.assert_close(plain, (reconstruction - target).square().mean())


@pytest.mark.parametrize("variational", [False, True])
def test_decoder_alone_decodes_the_same(variational: bool) -> None:
    model = LoraAutoencoder(LAYOUT, **SIZES, variational=variational)
    model.fit(make_rows(20))
    latents = model.encode(make_rows(3))
    expected = model.decode(latents)
    model.drop_encoder()
    assert not [name for name in model.state_dict() if "encoder" in name or "logvar" in name]
    loaded = LoraAutoencoder(LAYOUT, **model.config)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded.decode(latents), expected)
    with pytest.raises(InvalidArgumentError, match="only decodes: use the codec"):
        loaded.encode(make_rows(3))


ODD_LAYOUT = LoraLayout(
    (
        TargetModule("unet.0.a", 5, 7),
        TargetModule("unet.1.a", 5, 7),
        TargetModule("unet.b", 4, 3),
    ),
    2,
    "tiny",
)
ODD_SIZES = {
    "directions_per_factor": 2,
    "factors_per_token": 4,
    "latent_width": 3,
    "width": 4,
    "depth": 2,
    "kernel_size": 5,
}


def make_random_autoencoder(**options: bool) -> LoraAutoencoder:
    """Six factors in two tokens, of which the second lacks two; no weight is 0."""
    torch.manual_seed(1)
    model = LoraAutoencoder(ODD_LAYOUT, **{**ODD_SIZES, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def run_blocks(blocks: torch.nn.ModuleList, h: Tensor) -> Tensor:
    """h + conv(GELU(conv(norm(h)))), with one norm over channels and tokens."""
    for norm, conv, _, conv_out in blocks:
        normalized = torch.nn.functional.layer_norm(h, h.shape[1:])
        normalized = normalized * norm.weight[:, None] + norm.bias[:, None]
        h = h + conv_out(torch.nn.functional.gelu(conv(normalized)))
    return h


def test_default_config() -> None:
    model = LoraAutoencoder(LAYOUT)
    assert model.config == {
        "directions_per_factor": 32,
        "factors_per_token": 2,
        "latent_width": 64,
        "width": 128,
        "depth": 2,
        "kernel_size": 5,
        "share_directions": False,
        "variational": False,
        "decoder_only": False,
    }
    assert model.factor_encoder.rotations is None and model.logvar_head is None
    assert len(model.core_encoder.blocks) == len(model.core_decoder.blocks) == 2
    assert model.core_encoder.blocks[1][1].weight.shape == (128, 128, 5)
    options = {"depth": 1, "share_directions": True, "variational": True, "decoder_only": True}
    other = LoraAutoencoder(ODD_LAYOUT, **{**ODD_SIZES, **options})
    assert other.config == {**ODD_SIZES, **options}
    assert len(other.core_decoder.blocks) == 1


@pytest.mark.parametrize("share_directions", [False, True])
def test_encode_equals_its_formula(share_directions: bool) -> None:
    """z_t = g_t J_t + conv_t(g A), with g_t = [x_f D_f R_f for the factors f of token t]."""
    model = make_random_autoencoder(share_directions=share_directions)
    rows = torch.randn(3, ODD_LAYOUT.numel)
    groups = torch.zeros(3, 2, 8)
    for f, factor in enumerate(rows.split([10, 14, 10, 14, 8, 6], 1)):
        kind = (0, 1, 0, 1, 2, 3)[f] if share_directions else f
        coefficients = factor @ model.factor_encoder.directions[kind]
        if share_directions:
            coefficients = coefficients @ model.factor_encoder.rotations[f]
        groups[:, f // 4, f % 4 * 2 : f % 4 * 2 + 2] = coefficients
    core = model.core_encoder
    h = torch.stack([groups[:, t] @ core.proj_in[t] for t in range(2)], 2)
    convolved = core.conv_out(run_blocks(core.blocks, h)).transpose(1, 2)
    linear = torch.stack([groups[:, t] @ model.token_encoder.components[t] for t in range(2)], 1)
    torch.testing.assert_close(model.encode(rows), linear + convolved, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("share_directions", [False, True])
def test_decode_equals_its_formula(share_directions: bool) -> None:
    """x_f = û_f R_fᵀ D_fᵀ, with ĝ_t = z_t J_tᵀ + conv_t(z) A_t."""
    model = make_random_autoencoder(share_directions=share_directions)
    latents = torch.randn(3, 2, 3)
    core = model.core_decoder
    h = run_blocks(core.blocks, core.conv_in(latents.transpose(1, 2)))
    factors = []
    for f in range(6):
        kind, t, columns = f, f // 4, slice(f % 4 * 2, f % 4 * 2 + 2)
        coefficients = latents[:, t] @ model.token_decoder.components[t, columns].T
        coefficients = coefficients + h[:, :, t] @ core.proj_out[t][:, columns]
        if share_directions:
            kind = (0, 1, 0, 1, 2, 3)[f]
            coefficients = coefficients @ model.factor_decoder.rotations[f].T
        factors.append(coefficients @ model.factor_decoder.directions[kind].T)
    expected = torch.cat(factors, 1)
    torch.testing.assert_close(model.decode(latents), expected, atol=1e-4, rtol=1e-4)


def test_divergence_and_samples_equal_their_formulas() -> None:
    """Mean KL(N(μ, σ²) ‖ N(0, 1)) of each LoRA; z = μ + σ ε in training, μ else."""
    model, rows = make_random_autoencoder(variational=True), torch.randn(3, ODD_LAYOUT.numel)
    mean, logvar = model.encode_moments(rows)
    expected_logvar = model.logvar_head(mean.transpose(1, 2)).transpose(1, 2)
    assert logvar.shape == mean.shape
    torch.testing.assert_close(logvar, expected_logvar)
    normal = torch.distributions.Normal(mean, (logvar / 2).exp())
    standard = torch.distributions.Normal(0.0, 1.0)
    divergences = torch.distributions.kl_divergence(normal, standard)
    reconstruction, divergence = model(rows)
    torch.testing.assert_close(divergence, divergences.sum((1, 2)) / 6)
    torch.testing.assert_close(reconstruction, model.decode(mean))
    model.train()
    torch.manual_seed(2)
    sampled, _ = model(rows)
    torch.manual_seed(2)
    latents = mean + logvar.exp().sqrt() * torch.randn_like(mean)
    torch.testing.assert_close(sampled, model.decode(latents))


def test_variance_starts_small_and_is_bounded() -> None:
    """log σ² is -6 at initialization and stays in [-20, 10]."""
    model = LoraAutoencoder(ODD_LAYOUT, **ODD_SIZES, variational=True)
    rows = torch.randn(2, ODD_LAYOUT.numel)
    assert model.encode_moments(rows)[1].unique().tolist() == [-6]
    for bias, bound in ((-21.0, -20), (11.0, 10), (9.0, 9), (-19.5, -19.5)):
        torch.nn.init.constant_(model.logvar_head.bias, bias)
        assert model.encode_moments(rows)[1].unique().tolist() == [bound]


def test_plain_autoencoder_samples_nothing() -> None:
    model, rows = make_random_autoencoder().train(), torch.randn(3, ODD_LAYOUT.numel)
    mean, logvar = model.encode_moments(rows)
    reconstruction, divergence = model(rows)
    assert torch.equal(logvar, torch.full((3, 2, 3), -torch.inf))
    assert torch.equal(reconstruction, model.decode(mean))
    assert torch.equal(divergence, torch.zeros(3))


def test_convolutions_start_at_0_with_inputs_of_variance_1() -> None:
    torch.manual_seed(0)
    model = LoraAutoencoder(
        ODD_LAYOUT, directions_per_factor=8, factors_per_token=2, latent_width=16, width=256
    )
    groups = torch.randn(5, 3, 16)
    assert not model.core_encoder(groups).any()
    assert not model.core_decoder(torch.randn(5, 3, 16)).any()
    proj_in = model.core_encoder.proj_in.detach()
    assert float(proj_in.std()) == pytest.approx(1 / 4, rel=0.05)
    components = model.token_encoder.components.detach()
    torch.testing.assert_close(components.mT @ components, torch.eye(16).expand(3, 16, 16))


def test_factor_directions_are_principal_components_of_their_kind() -> None:
    """Directions of D_f from the rows of all factors of the kind, stacked."""
    torch.manual_seed(0)
    model = LoraAutoencoder(ODD_LAYOUT, **ODD_SIZES, share_directions=True)
    initial = model.factor_encoder.directions[1].detach()
    torch.testing.assert_close(initial.T @ initial, torch.eye(2))
    rows = torch.randn(20, ODD_LAYOUT.numel)
    model.fit(rows)
    stacked = torch.cat([rows[:, :10], rows[:, 24:34]])  # ``down`` of both unet.*.a
    directions = torch.linalg.svd(stacked).Vh[:2]
    fitted = model.factor_encoder.directions[0]
    torch.testing.assert_close((directions @ fitted).abs(), torch.eye(2), atol=1e-4, rtol=0)
    assert all(map(torch.equal, model.factor_decoder.directions, model.factor_encoder.directions))
    coefficients = model.factor_encoder.encode(rows).flatten(1)
    token = torch.linalg.svd(coefficients[:, :8]).Vh[:3]
    overlap = (token @ model.token_decoder.components[0]).abs()
    torch.testing.assert_close(overlap, torch.eye(3), atol=1e-4, rtol=0)


def test_projections_take_all_factors() -> None:
    projection = FactorProjection(ODD_LAYOUT, list_factor_kinds(ODD_LAYOUT, False), 2)
    with pytest.raises(ValueError, match="zip"):
        projection.decode(torch.zeros(3, 5, 2))
    with pytest.raises(ValueError, match="zip"):
        FactorProjection(ODD_LAYOUT, ["a"] * 5, 2)


def test_list_factor_kinds_names_every_factor() -> None:
    assert list_factor_kinds(ODD_LAYOUT, False) == [
        *("unet.0.a.down", "unet.0.a.up", "unet.1.a.down", "unet.1.a.up"),
        *("unet.b.down", "unet.b.up"),
    ]
    assert list_factor_kinds(ODD_LAYOUT, True) == [
        *("unet.*.a.down.10", "unet.*.a.up.14", "unet.*.a.down.10", "unet.*.a.up.14"),
        *("unet.b.down.8", "unet.b.up.6"),
    ]


def test_weight_preserved_loss_of_small_and_zero_targets() -> None:
    target = torch.tensor([[0.1, -0.2, 0.0], [0.5, 0.4, 0.1]])
    # λ = 0.5: weights 1.25, 1.5 and 1, then 1.5, 1.4 and 1.1
    weighted_sum = 1.25 * 0.01 + 1.5 * 0.04 + 1.5 * 0.25 + 1.4 * 0.16 + 1.1 * 0.01
    expected = torch.tensor(weighted_sum / 6)
    loss = compute_weight_preserved_loss(torch.zeros(2, 3), target, 0.5)
    torch.testing.assert_close(loss, expected)
    zeros = torch.zeros(1, 3)
    loss = compute_weight_preserved_loss(zeros + 2, zeros, 3.0)
    torch.testing.assert_close(loss, torch.tensor(4.0))
