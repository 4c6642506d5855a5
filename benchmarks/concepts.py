"""The avatars bundle as the benchmarks of composition see it: its people's LoRAs, and LoRAs of single changes.

Concept LoRAs are differential LoRAs, fitted to drawn pairs of training people; people are the benchmark's, never seen.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data_builder.avatars.edits import edited
from data_builder.avatars.identity import SPLITS, identity, scene
from data_builder.avatars.rendering import draw
from data_builder.baselines.differential_lora import differential
from hyperlora import pretrained
from hyperlora.data.images import pixels_of, to_tensor
from hyperlora.diffusion.diffusion_base import load_base
from hyperlora.encoders.attribute_classifier import Reader
from hyperlora.evaluation.benchmark import load_benchmark
from hyperlora.evaluation.subject_evaluator import Judge
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora import ImageToLora

NEUTRAL = {
    "glasses": "none",
    "expression": "neutral",
    "eyes": "open",
    "garment": "t-shirt",
    "background": "white",
    "facial_hair": "none",
    "style": "plain",
}


class World:
    """The bundle, its benchmark and LoRAs of its people."""

    def __init__(self, people: int, steps: int) -> None:
        self.base = load_base(pretrained.BASE)
        self.reader = Reader.from_pretrained(pretrained.EVALUATOR)
        self.judge = Judge(self.base, self.reader, load_benchmark(pretrained.BENCHMARK, self.base.resolution, people))
        model = ImageToLora.from_pretrained(pretrained.MODEL, base=self.base)
        with torch.no_grad():
            self.people = model.forward(self.judge.benchmark.photos[:, :1])
        self.steps = steps

    def change(
        self, attribute: str, value: str, pairs: int = 4, steps: int = 120, method: Callable[..., Any] = differential
    ) -> LoraWeights:
        """A LoRA of one attribute's change, fitted to drawn pairs of training people."""
        before, after = self.pairs(attribute, value, pairs)
        return method(self.base, before, after, steps=steps, label=f"{attribute} {value}")

    def pairs(self, attribute: str, value: str, pairs: int = 4) -> tuple[Tensor, Tensor]:
        """Drawn pairs of training people, before and after, [pairs, 3, size, size] each."""
        made = []
        for seed in SPLITS["train"][:pairs]:
            person, how = identity(seed), replace(scene(seed, 1), hat="none", style="plain")
            if getattr(how, attribute, None) == value or getattr(person, attribute, None) == value:
                person, how = edited(person, how, **{attribute: NEUTRAL[attribute]})
            after = edited(person, how, **{attribute: value})
            size = self.base.resolution
            made.append(torch.stack([to_tensor(draw(*both), size) for both in ((person, how), after)]))
        before, after_ = torch.stack(made).unbind(1)
        return before, after_

    def identity_of(self, pictures: Sequence[Image.Image], people: Sequence[int]) -> Tensor:
        """Identity score of each picture as each person, on the benchmark's scale."""
        found = self.reader(pixels_of(pictures)).identity
        real = self.judge.scale.real[list(people)].mean(1)
        scale = self.judge.scale
        return ((found * real).sum(-1) - scale.different) / (scale.same - scale.different)

    def read(self, pictures: Sequence[Image.Image], attribute: str) -> list[str]:
        classes = self.reader.attributes[attribute]
        return [classes[i] for i in self.reader(pixels_of(pictures)).logits[attribute].argmax(-1).tolist()]
