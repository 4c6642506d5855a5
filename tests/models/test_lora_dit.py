"""The diffusion transformer over latents of LoRAs."""

from math import pi

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.features import ImageFeatures
from hyperlora.models.lora_dit import LoraDiT, interpolate_noise
from tests.mock_cuda import mock_cuda


@pytest.mark.parametrize("per_token_projections", [False, True])
def test_lora_dit_starts_at_zero_and_learns_conditional_latents(
    per_token_projections: bool,
) -> None:
    torch.manual_seed(0)
    x, photo_features = torch.randn(4, 6, 3), ImageFeatures(torch.randn(4, 1, 5, 12))
    model = LoraDiT(6, 3, 12, 32, 2, 2, per_token_projections)
    assert model(x, torch.rand(4), photo_features).abs().max() == 0
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        t, drop_mask = torch.rand(4), torch.rand(4) < 0.1
        noisy_latents = interpolate_noise(torch.randn_like(x), x, t)
        (model(noisy_latents, t, photo_features, drop_mask) - x).square().mean().backward()
        optimizer.step()
    samples = model.sample(photo_features, torch.randn_like(x), num_inference_steps=10)
    nearest = torch.cdist(samples.flatten(1), x.flatten(1)).argmin(1)
    assert nearest.tolist() == [0, 1, 2, 3]
    noise = torch.randn_like(x)
    guided = model.sample(photo_features, noise, num_inference_steps=4, guidance_scale=1.0000001)
    unguided = model.sample(photo_features, noise, num_inference_steps=4)
    assert torch.allclose(guided, unguided, atol=1e-4)


def test_per_token_projections_are_weights_of_one_token_each() -> None:
    model = LoraDiT(6, 3, 12, 32, 1, 2, per_token_projections=True)
    photo_features = ImageFeatures(torch.randn(1, 1, 5, 12))
    with torch.no_grad():
        model.final_layer.weight[2] += 1  # the network is 0 elsewhere
    output = model(torch.randn(1, 6, 3), torch.rand(1), photo_features)
    assert [bool(token.any()) for token in output[0]] == [False, False, True, False, False, False]
    output.sum().backward()
    assert model.x_embedder.weight.grad is not None
    shared = LoraDiT(6, 3, 12, 32, 1, 2)
    assert shared.x_embedder.weight.shape == (32, 3)


def make_random_dit() -> LoraDiT:
    """A network whose output depends on all its inputs; a new one is 0 everywhere."""
    torch.manual_seed(0)
    model = LoraDiT(6, 3, 12, width=32, depth=2, num_heads=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_sample_follows_the_formula_of_guidance() -> None:
    """Euler steps on x_uncond + w (x_cond - x_uncond)."""
    model, photo_features = make_random_dit(), ImageFeatures(torch.randn(2, 1, 5, 12))
    noise, scale = torch.randn(2, 6, 3), 2.5
    x_t = noise
    with torch.no_grad():
        for t in (1.0, 0.5):
            times = torch.full((2,), t)
            cond = model(x_t, times, photo_features)
            uncond = model(x_t, times, photo_features, torch.ones(2, dtype=torch.bool))
            velocity = (x_t - (uncond + scale * (cond - uncond))) / t
            x_t = x_t - 0.5 * velocity
    samples = model.sample(photo_features, noise, num_inference_steps=2, guidance_scale=scale)
    torch.testing.assert_close(samples, x_t, atol=1e-5, rtol=1e-4)
    unguided = model.sample(photo_features, noise, num_inference_steps=2)
    assert (samples - unguided).abs().max() > 1e-3


def test_dropped_samples_do_not_see_their_photos() -> None:
    model, x, t = make_random_dit(), torch.randn(2, 6, 3), torch.rand(2)
    drop_mask = torch.tensor([True, False])
    with torch.no_grad():
        first, second = (
            model(x, t, ImageFeatures(torch.randn(2, 1, 5, 12)), drop_mask) for _ in range(2)
        )
    torch.testing.assert_close(first[0], second[0])
    assert (first[1] - second[1]).abs().max() > 1e-3


def test_interpolate_noise_is_clean_at_0_and_noise_at_1() -> None:
    noise, x = torch.randn(3, 6, 3), torch.randn(3, 6, 3)
    noisy = interpolate_noise(noise, x, torch.tensor([0.0, 1.0, 0.25]))
    expected = torch.stack([x[0], noise[1], 0.75 * x[2] + 0.25 * noise[2]])
    torch.testing.assert_close(noisy, expected)


def test_mean_counts_by_the_time_and_not_without_condition() -> None:
    """x̂ = network + t m, where the photos are not dropped."""
    model, photo_features = make_random_dit(), ImageFeatures(torch.randn(2, 1, 5, 12))
    x, t, mean = torch.randn(2, 6, 3), torch.tensor([0.25, 0.5]), torch.randn(2, 6, 3)
    drop_mask = torch.tensor([False, True])
    plain = model(x, t, photo_features, drop_mask)
    output = model(x, t, photo_features, drop_mask, mean)
    torch.testing.assert_close(output[0], plain[0] + 0.25 * mean[0])
    torch.testing.assert_close(output[1], plain[1])


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_sample_of_one_step_adds_the_guided_mean(guidance_scale: float) -> None:
    model, photo_features = make_random_dit(), ImageFeatures(torch.randn(2, 1, 5, 12))
    noise, mean = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    plain = model.sample(photo_features, noise, 1, guidance_scale)
    sample = model.sample(photo_features, noise, 1, guidance_scale, mean)
    torch.testing.assert_close(sample, plain + guidance_scale * mean)


def make_conditional_inputs(batch_size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, 6, 3], t [B] and tokens of two photos [B, 2, 5, 12]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch_size, 6, 3, generator=generator)
    t = torch.rand(batch_size, generator=generator)
    return x, t, torch.randn(batch_size, 2, 5, 12, generator=generator)


def embed_time(t: Tensor) -> Tensor:
    """Cosines and sines of 1000 t / 10000^(i / 128), [batch, 256]."""
    angles = 1000 * t.double()[:, None] / 10_000 ** (torch.arange(128).double() / 128)
    return torch.cat([angles.cos(), angles.sin()], 1).float()


def normalize(x: Tensor) -> Tensor:
    return nn.LayerNorm(x.shape[-1], elementwise_affine=False)(x)


def test_default_config() -> None:
    model = LoraDiT(6, 3, 12)
    assert model.config == {
        "width": 192,
        "depth": 6,
        "num_heads": 6,
        "per_token_projections": False,
    }
    assert (model.num_tokens, model.latent_width, len(model.blocks)) == (6, 3, 6)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["null_token"] == (1, 192) and shapes["pos_embed"] == (6, 192)
    assert shapes["x_embedder.weight"] == (192, 3) and shapes["final_layer.weight"] == (3, 192)
    assert LoraDiT(6, 3, 12, 8, 1, 2, True).config["per_token_projections"] is True


@pytest.mark.parametrize("per_token_projections", [False, True])
def test_initial_weights(per_token_projections: bool) -> None:
    """Embeddings of standard deviation 0.02, a per-token x_embedder of latent_width^-1/2."""
    torch.manual_seed(0)
    model = LoraDiT(40, 64, 12, 64, 0, 2, per_token_projections)
    assert float(model.pos_embed.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(LoraDiT(1, 1, 1, 1024, 0).null_token.detach().std()) == pytest.approx(
        0.02, rel=0.1
    )
    expected_std = 1 / 8 if per_token_projections else 1 / 8 / 3**0.5  # normal, and uniform
    assert float(model.x_embedder.weight.detach().std()) == pytest.approx(expected_std, rel=0.03)
    assert not model.final_layer.weight.any() and not model.final_layer.bias.any()
    assert per_token_projections is not bool(model.x_embedder.bias.any())


@pytest.mark.parametrize("per_token_projections", [False, True])
def test_forward_equals_its_formula(per_token_projections: bool) -> None:
    """final(LN(h) (1 + scale) + shift), both of c = time embedding + mean of the photos."""
    torch.manual_seed(0)
    model = LoraDiT(6, 3, 12, 8, 2, 2, per_token_projections)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, t, tokens = make_conditional_inputs()
    drop_mask = torch.tensor([False, True, False])
    norm, linear = model.y_embedder
    normalized = F.layer_norm(tokens.flatten(1, 2), (12,), norm.weight, norm.bias)
    photo_tokens = F.linear(normalized, linear.weight, linear.bias)
    photo_tokens[1] = model.null_token
    linear_in, _, linear_out = model.t_embedder
    c = linear_out(F.silu(linear_in(embed_time(t)))) + photo_tokens.sum(1) / 10
    if per_token_projections:
        weight, bias = model.x_embedder.weight, model.x_embedder.bias
        h = torch.stack([x[:, i] @ weight[i] + bias[i] for i in range(6)], 1) + model.pos_embed
    else:
        h = F.linear(x, model.x_embedder.weight, model.x_embedder.bias) + model.pos_embed
    for block in model.blocks:
        h = block(h, photo_tokens, c)
    scale, shift = model.adaLN_modulation[1](F.silu(c)).unflatten(-1, (2, 1, 8)).unbind(1)
    expected = model.final_layer(normalize(h) * (1 + scale) + shift)
    output = model(x, t, ImageFeatures(tokens), drop_mask)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_time_embedding_equals_its_formula() -> None:
    model = LoraDiT(6, 3, 12, 8, 0, 2)
    seen: list[Tensor] = []
    model.t_embedder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x, _, tokens = make_conditional_inputs(5)
    t = torch.tensor([0.0, 0.01, 0.25, 0.7, 1.0])
    model(x, t, ImageFeatures(tokens))
    torch.testing.assert_close(seen[0], embed_time(t), atol=3e-4, rtol=0)


def test_block_equals_attention_of_torch() -> None:
    """Three times h + gate ⊙ sublayer(LN(h) (1 + scale) + shift): adaLN-zero of DiT."""
    torch.manual_seed(0)
    block = LoraDiT(6, 3, 12, 8, 1, 2).blocks[0]
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    h, photo_tokens, c = torch.randn(3, 6, 8), torch.randn(3, 5, 8), torch.randn(3, 8)
    self_attention = nn.MultiheadAttention(8, 2, batch_first=True)
    self_attention.in_proj_weight.data, self_attention.in_proj_bias.data = (
        block.qkv.weight.data,
        block.qkv.bias.data,
    )
    self_attention.out_proj = block.attn_out
    cross_attention = nn.MultiheadAttention(8, 2, batch_first=True)
    cross_attention.in_proj_weight.data, cross_attention.in_proj_bias.data = (
        torch.cat([block.cross_q.weight.data, block.cross_kv.weight.data]),
        torch.cat([block.cross_q.bias.data, block.cross_kv.bias.data]),
    )
    cross_attention.out_proj = block.cross_out

    def run_mlp(x: Tensor) -> Tensor:
        y = block.mlp[0](x)
        y = y / 2 * (1 + torch.tanh((2 / pi) ** 0.5 * (y + 0.044715 * y**3)))
        return block.mlp[2](y)

    sublayers = (
        lambda x: self_attention(x, x, x)[0],
        lambda x: cross_attention(x, photo_tokens, photo_tokens)[0],
        run_mlp,
    )
    modulation = block.adaLN_modulation[1](F.silu(c)).unflatten(-1, (3, 3, 1, 8))
    expected = h
    for i, sublayer in enumerate(sublayers):
        scale, shift, gate = modulation[:, i].unbind(1)
        expected = expected + gate * sublayer(normalize(expected) * (1 + scale) + shift)
    torch.testing.assert_close(block(h, photo_tokens, c), expected, atol=1e-5, rtol=1e-4)
    assert block.mlp[0].out_features == 32


@pytest.mark.parametrize("guidance_scale", [None, 2.0])
def test_sample_equals_euler_steps_of_the_velocity(guidance_scale: float | None) -> None:
    """x_t - v / N with v = (x_t - x) / t; 10 steps and no guidance unless told otherwise."""
    model = make_random_dit()
    noise, _, tokens = make_conditional_inputs()
    photo_features, mean = ImageFeatures(tokens), noise.flip(0)
    num_steps = 10 if guidance_scale is None else 3
    x_t = noise
    with torch.no_grad():
        for i in range(num_steps):
            t = torch.full((3,), 1 - i / num_steps)
            pred_x0 = model(x_t, t, photo_features, mean=mean)
            if guidance_scale is not None:
                uncond_x0 = model(x_t, t, photo_features, torch.ones(3, dtype=torch.bool))
                pred_x0 = uncond_x0 + guidance_scale * (pred_x0 - uncond_x0)
            x_t = x_t - (x_t - pred_x0) / t[:, None, None] / num_steps
    options = {} if guidance_scale is None else {"num_inference_steps": 3, "guidance_scale": 2.0}
    samples = model.sample(photo_features, noise, mean=mean, **options)
    torch.testing.assert_close(samples, x_t, atol=1e-5, rtol=1e-4)
    assert not samples.requires_grad


def test_sample_without_guidance_runs_the_network_once_per_step() -> None:
    model = make_random_dit()
    noise, _, tokens = make_conditional_inputs()
    batch_sizes: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: batch_sizes.append(len(inputs[0])))
    for guidance_scale in (1.0, 2.0):
        model.sample(ImageFeatures(tokens), noise, 2, guidance_scale)
    assert batch_sizes == [3, 3, 6, 6]


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2, 5)])
def test_interpolate_noise_takes_any_number_of_axes(shape: tuple[int, ...]) -> None:
    noise, x = torch.randn(shape), torch.randn(shape)
    t = torch.tensor([0.2, 0.5, 0.7])
    expected = torch.stack([(1 - t[i]) * x[i] + t[i] * noise[i] for i in range(3)])
    torch.testing.assert_close(interpolate_noise(noise, x, t), expected)


def test_sample_stays_on_its_device() -> None:
    model, (noise, _, tokens) = make_random_dit(), make_conditional_inputs()
    expected = model.sample(ImageFeatures(tokens), noise, 2, 2.0, noise)
    with mock_cuda(), torch.no_grad():
        noise, tokens = noise.to("cuda"), tokens.to("cuda")
        samples = model.to("cuda").sample(ImageFeatures(tokens), noise, 2, 2.0, noise)
        assert samples.is_cuda
        samples = samples.cpu()
    torch.testing.assert_close(samples, expected, atol=1e-5, rtol=1e-4)
