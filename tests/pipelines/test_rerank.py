"""Scores of candidates: the mean over prompts, of images that share their noise."""

from typing import Any

import torch
from torch import Tensor

from hyperlora.data.images import to_tensor
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.rerank import IdentityReranker, make_scoring_prompts
from tests.tiny_pipelines import get_tiny_pipeline

PROMPTS = ("a dog", "a red sky")
OPTIONS: Any = {"num_inference_steps": 1, "guidance_scale": 4.0}


class BrightnessJudge:
    """The score of an image is a weighted sum of its pixels, times the mean of the photos."""

    image_size = 20

    def __call__(self, photos: Tensor, images: Tensor) -> Tensor:
        """Score images [n, 3, 20, 20]."""
        weights = torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(1))
        return (images * weights).sum((1, 2, 3)) * photos.mean()


def test_reranker_averages_over_prompts_with_the_same_noise_for_each_lora() -> None:
    base = DiffusionBase("tiny/base", get_tiny_pipeline("stable_diffusion").pipe)
    layout = base.make_layout("attention", 2)
    rows = torch.randn(3, layout.numel, generator=torch.Generator().manual_seed(0))
    loras, judge = LoraWeights.unflatten(layout, rows), BrightnessJudge()
    photos = torch.full((2, 3, 8, 8), 0.7)
    rows *= 3
    scores = IdentityReranker(base, judge, PROMPTS, **OPTIONS)(loras, photos)
    expected = []
    for lora in loras:
        images = generate_images(base, PROMPTS, lora, seeds=[0, 1], **OPTIONS)
        pixels = torch.stack([to_tensor(image, 20) for image in images])
        expected.append(judge(photos, pixels).mean())
    assert scores.shape == (3,)
    assert (scores - torch.stack(expected)).abs().max() < 0.1 * scores.std()


def test_scoring_prompts_name_the_subject() -> None:
    assert make_scoring_prompts("xyz dog") == (
        "a portrait of xyz dog",
        "a portrait of xyz dog, smiling",
    )
