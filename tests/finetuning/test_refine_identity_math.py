"""One loss of ``refine_identity`` by its formula, for each subject alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.data.images import to_tensor
from hyperlora.diffusion.conditions import map_tensors
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.encoders.identity_embedder import IdentityEmbedder
from hyperlora.errors import InvalidArgumentError
from hyperlora.finetuning.config import RefineConfig
from hyperlora.finetuning.refine_identity import refine_identity
from hyperlora.lora.weights import LoraWeights
from tests.tiny_pipelines import get_tiny_pipeline

K = 2
PROMPTS = ["a dog", "a red sky"]


class Corners(nn.Module):
    """An encoder whose features are the mean colors of the four quarters."""

    def compute_pooled_features(self, images: Tensor) -> Tensor:
        """Compute features [n, 12] of images [n, 3, h, w]."""
        return F.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture(scope="module")
def base() -> DiffusionBase:
    return DiffusionBase("tiny/base", get_tiny_pipeline("stable_diffusion").pipe)


@pytest.fixture(scope="module")
def predicted(base: DiffusionBase) -> LoraWeights:
    layout = base.make_layout("attention", 2)
    rows = torch.randn(K, layout.numel, generator=torch.Generator().manual_seed(0))
    return LoraWeights.unflatten(layout, rows * 0.3)


def make_embedder() -> Any:
    generator = torch.Generator().manual_seed(1)
    weight, bias = (torch.randn(*shape, generator=generator) for shape in ((5, 12), (5,)))
    return IdentityEmbedder(Corners(), weight, bias)  # type: ignore[arg-type]


def make_photos() -> Tensor:
    return torch.rand(K, 3, 3, 10, 10, generator=torch.Generator().manual_seed(2))


def predict_x0(
    base: DiffusionBase, lora: LoraWeights, noisy: Tensor, timestep: Tensor, conditions: Any
) -> Tensor:
    """x_0 = (x_t - σ ε) / α of a base that predicts ε."""
    alpha_squared: Tensor = base.noise_scheduler.alphas_cumprod[timestep]  # type: ignore[attr-defined]
    with base.inject_lora(lora):
        noise = base.predict(noisy, timestep[None], conditions)
    return (noisy - (1 - alpha_squared).sqrt() * noise) / alpha_squared.sqrt()


def fit_on_top(
    base: DiffusionBase, predicted: LoraWeights, config: RefineConfig, regularization_weight: float
) -> LoraWeights:
    """Descend the gradient of each subject; the random numbers are those of one generator."""
    embedder, photos = make_embedder(), make_photos()
    layout = predicted.layout.with_rank(config.rank or predicted.layout.rank)
    rows = list(LoraWeights.init_batch(layout, K, config.seed).flatten())
    conditions = base.encode_prompts(PROMPTS)
    self_latents = []
    for i in range(K):
        loras, seeds = predicted[[i, i]], [config.seed, config.seed + 1]
        images = generate_images(base, PROMPTS, loras, seeds=seeds, num_inference_steps=6)
        pixels = torch.stack([to_tensor(image, base.resolution) for image in images])
        self_latents.append(base.encode_images(pixels))
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.num_steps):
        shape = (config.batch_size, K)
        indices = torch.randint(len(PROMPTS), shape, generator=generator)
        timesteps = torch.randint(200, 900, shape, generator=generator)
        shape = (*shape, *self_latents[0].shape[1:])
        noise = torch.randn(shape, generator=generator)
        for i in range(K):
            target = F.normalize(embedder(photos[i]).mean(0), dim=0)
            row, losses = rows[i].clone().requires_grad_(), []
            for j in range(config.batch_size):
                index, timestep = indices[j, i], timesteps[j, i]
                alpha_squared = base.noise_scheduler.alphas_cumprod[timestep]  # type: ignore[attr-defined]
                noisy = alpha_squared.sqrt() * self_latents[i][index]
                noisy = (noisy + (1 - alpha_squared).sqrt() * noise[j, i])[None]
                own = map_tensors(lambda value, n=int(index): value[n : n + 1], conditions)
                lora = predicted[[i]] + LoraWeights.unflatten(layout, row[None])
                x0 = predict_x0(base, lora, noisy, timestep, own)
                with torch.no_grad():
                    reference = predict_x0(base, predicted[[i]], noisy, timestep, own)
                cosine = F.cosine_similarity(embedder(base.decode_latents(x0)), target[None])
                distance = (x0 - reference).square().mean()
                losses.append(1 - cosine + regularization_weight * distance)
            (gradient,) = torch.autograd.grad(torch.cat(losses).mean(), row)
            rows[i] = rows[i] - config.lr * gradient
    return LoraWeights.unflatten(layout, torch.stack(rows))


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"num_steps": 2, "batch_size": 2, "rank": 3, "seed": 5, "lr": 200.0}, {"weight": 0.1}),
        ({"num_steps": 2, "batch_size": 1, "lr": 200.0}, {}),
    ],
)
def test_refine_identity_descends_the_gradient_of_its_loss(
    settings: dict[str, Any],
    options: dict[str, float],
    base: DiffusionBase,
    predicted: LoraWeights,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With plain gradient descent in the place of Adam, which hides the size of a gradient."""
    config = RefineConfig(**settings)
    weights = {f"regularization_{name}": value for name, value in options.items()}
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    refined = refine_identity(
        base, predicted, make_photos(), make_embedder(), PROMPTS, config, **weights
    )
    on_top = fit_on_top(base, predicted, config, options.get("weight", 0.5))
    assert refined.layout.rank == 2 + (config.rank or 2)
    sizes, errors = [], []
    deltas = zip(*(lora.get_delta_weights() for lora in (refined, predicted, on_top)), strict=True)
    for delta, start, fit in deltas:
        sizes.append(fit.abs().amax())
        errors.append((delta - start - fit).abs().amax())

    assert max(errors) <= 1e-3 * max(sizes)


def test_refine_identity_trains_on_images_of_six_steps(
    base: DiffusionBase, predicted: LoraWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_steps = []

    def record_steps(*args: Any, num_inference_steps: int, **options: Any) -> Any:
        num_steps.append(num_inference_steps)
        return generate_images(*args, num_inference_steps=num_inference_steps, **options)

    monkeypatch.setattr("hyperlora.finetuning.refine_identity.generate_images", record_steps)
    config = RefineConfig(num_steps=0)
    refine_identity(base, predicted, make_photos(), make_embedder(), PROMPTS, config)
    assert num_steps == [6] * K, "one batch of all prompts for each subject"


def test_refine_identity_of_one_image_of_one_subject(
    base: DiffusionBase, predicted: LoraWeights
) -> None:
    config = RefineConfig(num_steps=1, batch_size=1, lr=0.1)
    refined = refine_identity(
        base, predicted[[0]], make_photos()[:1], make_embedder(), PROMPTS[:1], config
    )
    assert len(refined) == 1 and refined.flatten().isfinite().all()


def test_refine_identity_cuts_to_the_rank_of_the_config(
    base: DiffusionBase, predicted: LoraWeights
) -> None:
    embedder, photos = make_embedder(), make_photos()
    config = RefineConfig(num_steps=0, out_rank=1)
    refined = refine_identity(base, predicted, photos, embedder, PROMPTS[:1], config)
    assert refined.layout.rank == 1
    difference = (refined - predicted.resize(1)).compute_delta_norms()
    assert difference.max() <= 1e-4 * predicted.compute_delta_norms().max()
    config = RefineConfig(num_steps=0, out_rank=99)
    with pytest.raises(InvalidArgumentError, match="out_rank 99 asked for"):
        refine_identity(base, predicted, photos, embedder, PROMPTS, config)
