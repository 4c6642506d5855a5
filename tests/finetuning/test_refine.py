"""Refinement by photos is fine-tuning on their examples, in the rank that the config asks for."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.errors import InvalidArgumentError
from hyperlora.finetuning.config import FineTuneConfig, RefineConfig
from hyperlora.finetuning.refine import make_photo_examples, refine_lora, resize_sum
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights
from tests.finetuning.toy_base import ToyBase

K = 3
LAYOUT = LoraLayout((TargetModule("unet.a", 2, 3), TargetModule("unet.b", 4, 5)), 2, "toy")


class PhotoBase(ToyBase):
    """A toy base of 8x6 latents that encodes every second pixel and the length of a prompt."""

    resolution = 8

    def check_generates_images(self) -> None:
        """Raise as a base does that edits alone."""
        if self.offload == "edits":
            raise InvalidArgumentError("an input image is needed")

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images [n, 3, h, w] as [n, 2, h / 2, w / 2]."""
        return images[:, :2, ::2, ::2] * 2 - 1

    def encode_prompts(self, prompts: Any, requires_grad: bool = False) -> Any:
        """Encode prompts as two tokens and a pooled embedding."""
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        embeds = lengths[:, None, None] * torch.tensor([[1.0, 2, 3], [4, 5, 6]]) / 100
        conditions = {"prompt_embeds": embeds, "pooled_prompt_embeds": lengths[:, None]}
        return {name: value.to(self.device) for name, value in conditions.items()}


def make_photos(size: int = 8, num_photos: int = 2) -> Tensor:
    return torch.rand(K, num_photos, 3, size, size, generator=torch.Generator().manual_seed(0))


def make_predicted(rank: int = 2) -> LoraWeights:
    layout = LAYOUT.with_rank(rank)
    generator = torch.Generator().manual_seed(1)
    return LoraWeights.unflatten(layout, torch.randn(K, layout.numel, generator=generator) * 0.3)


def check_deltas(loras: LoraWeights, *terms: LoraWeights) -> None:
    """ΔW is the sum of those of the terms."""
    terms_by_target = zip(*(term.get_delta_weights() for term in terms), strict=True)
    for delta, expected in zip(loras.get_delta_weights(), terms_by_target, strict=True):
        torch.testing.assert_close(delta, sum(expected), atol=1e-5, rtol=1e-4)


def fit_on_top(
    config: RefineConfig, rank: int, prompt: str, photos: Tensor, predicted: LoraWeights
) -> LoraWeights:
    """Fit the LoRAs on top, from equal random ``down`` factors."""
    base: Any = PhotoBase()
    layout = LAYOUT.with_rank(rank)
    torch.manual_seed(config.seed)
    start = LoraWeights.zeros(layout, (), layout.init_std).flatten()
    fine_tune = FineTuneConfig(
        num_steps=config.num_steps, lr=config.lr, batch_size=config.batch_size
    )
    return fine_tune_loras(
        base,
        make_photo_examples(base, photos, prompt, config.resolution),
        start.repeat(K, 1),
        partial(LoraWeights.unflatten, layout),
        fine_tune,
        base_loras=predicted,
    ).weights


@pytest.mark.parametrize(
    ("options", "rank_on_top", "out_rank"),
    [
        ({}, 8, 4),  # the largest rank that a target has
        ({"rank": 1, "seed": 5, "batch_size": 3, "resolution": 4}, 1, 3),
        ({"rank": 3, "out_rank": 4, "is_on_top": False}, 3, 4),
    ],
)
def test_refine_lora_adds_a_lora_that_fits_the_photos(
    options: dict[str, Any], rank_on_top: int, out_rank: int
) -> None:
    base: Any = PhotoBase()
    config = RefineConfig(num_steps=3, lr=0.05, **options)
    predicted, photos = make_predicted(), make_photos()
    refined = refine_lora(base, predicted, photos, config, prompt="a b c")
    on_top = fit_on_top(config, rank_on_top, "a b c", photos, predicted)
    assert refined.layout.rank == out_rank
    check_deltas(refined, (predicted + on_top).resize(out_rank))
    assert on_top.compute_delta_norms()[:, 0].min() > 1e-3


def test_refine_lora_has_a_prompt_and_settings_by_default() -> None:
    base: Any = PhotoBase()
    prompts, encode_prompts = [], base.encode_prompts
    base.encode_prompts = lambda texts, **options: (
        prompts.extend(texts) or encode_prompts(texts, **options)
    )
    predicted, photos = make_predicted(), make_photos()
    torch.manual_seed(9)
    state = torch.get_rng_state()
    refined = refine_lora(base, predicted, photos)
    assert set(prompts) == {"a portrait of sks person"}
    assert torch.equal(torch.get_rng_state(), state)
    on_top = fit_on_top(RefineConfig(), 8, "a portrait of sks person", photos, predicted)
    check_deltas(refined, (predicted + on_top).resize(4))


@pytest.mark.parametrize(("out_rank", "rank"), [(None, 2), (2, 2), (1, 1)])
def test_refine_lora_trains_the_prediction_itself(out_rank: int | None, rank: int) -> None:
    base: Any = PhotoBase()
    config = RefineConfig(num_steps=3, lr=0.05, is_on_top=False, out_rank=out_rank, seed=4)
    predicted, photos = make_predicted(), make_photos()
    refined = refine_lora(base, predicted.apply(Tensor.double), photos, config, prompt="a b")
    torch.manual_seed(4)
    fitted = fine_tune_loras(
        base,
        make_photo_examples(base, photos, "a b"),
        predicted.flatten(),
        partial(LoraWeights.unflatten, LAYOUT),
        FineTuneConfig(num_steps=3, lr=0.05, batch_size=config.batch_size),
    ).weights
    assert refined.layout.rank == rank and refined.flatten().dtype == torch.float32
    check_deltas(refined, fitted if rank == 2 else fitted.resize(1))
    if rank == 2:
        torch.testing.assert_close(refined.flatten(), fitted.flatten())


def test_refine_lora_runs_on_the_device_of_the_base() -> None:
    base: Any = PhotoBase("meta")
    config = RefineConfig(num_steps=1, is_on_top=False)
    examples_device = make_photos().to("meta")
    refined = refine_lora(base, make_predicted(), examples_device, config)
    assert refined.flatten().device.type == "meta"


def test_refine_lora_refuses_ranks_that_no_target_has() -> None:
    base: Any = PhotoBase()
    with pytest.raises(InvalidArgumentError, match="rank 5 asked for"):
        refine_lora(base, make_predicted(), make_photos(), RefineConfig(rank=5))


@pytest.mark.parametrize(
    ("rank", "out_rank", "expected"), [(3, None, 3), (6, None, 4), (6, 2, 2), (3, 4, 4)]
)
def test_resize_sum_keeps_everything_unless_told(
    rank: int, out_rank: int | None, expected: int
) -> None:
    loras = make_predicted(rank)
    resized = resize_sum(loras, out_rank)
    assert resized.layout.rank == expected
    if expected > 2:
        check_deltas(resized, loras)
    for down, up in zip(resized.down, resized.up, strict=True):
        spectra = torch.linalg.svdvals(down), torch.linalg.svdvals(up)
        num_values = min(spectrum.shape[-1] for spectrum in spectra)  # further ones are 0
        torch.testing.assert_close(spectra[0][:, :num_values], spectra[1][:, :num_values])


@pytest.mark.parametrize(
    ("photo_size", "resolution", "size"), [(8, None, 8), (12, None, 8), (12, 4, 4), (8, 16, 8)]
)
def test_photo_examples_are_photos_at_the_resolution(
    photo_size: int, resolution: int | None, size: int
) -> None:
    base: Any = PhotoBase()
    photos = make_photos(photo_size).round()  # 0 and 1, beyond which the interpolation goes
    examples = make_photo_examples(base, photos, "a b", resolution)
    pixels = photos.flatten(0, 1)
    if photo_size != size:
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    expected = base.encode_images(pixels).view(K, 2, 2, size // 2, size // 2)
    torch.testing.assert_close(examples.latents, expected)


def test_photo_examples_share_their_prompt() -> None:
    base: Any = PhotoBase()
    examples = make_photo_examples(base, make_photos(num_photos=4), "a b")
    for name, value in base.encode_prompts(["a b"]).items():
        conditions: Any = examples.conditions
        assert torch.equal(conditions[name], value.expand(K, 4, *value.shape[1:]))
    assert examples.prompts == [["a b"] * 4] * K and examples.num_examples is None
    with pytest.raises(InvalidArgumentError, match="input image"):
        make_photo_examples(PhotoBase(offload="edits"), make_photos(), "a")  # type: ignore[arg-type]
