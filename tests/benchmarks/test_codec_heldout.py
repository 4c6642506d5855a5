"""LoRAs compared as numbers, and the trial of codecs and models on held-out rows of a build."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablations.codec_heldout import held_out, table
from data_builder.build.make_plan import make_plan
from data_builder.build.plan import Recipe, write_plan
from data_builder.build.run import run
from data_builder.sources.sources import Avatars
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.diffusion.diffusion_base import load_base
from hyperlora.encoders.attribute_classifier import Reader
from hyperlora.evaluation.benchmark import Benchmark, Prompt
from hyperlora.evaluation.metrics import nearest, spread
from hyperlora.evaluation.subject_evaluator import Judge
from hyperlora.lora.layout import LoraLayout, Site
from hyperlora.lora.merge import apart, relative_error
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.image_to_lora_base import Sampling
from hyperlora.pipelines.lora_codec import LoraCodec

LAYOUT = LoraLayout((Site("unet.a", 24, 40), Site("unet.b", 6, 8)), 2, "tiny")


def test_apart_is_what_the_products_say() -> None:
    one, other = (LoraWeights.unflatten(LAYOUT, torch.randn(3, LAYOUT.numel)) for _ in range(2))
    error, cosine = apart(one, other)
    assert abs(float(error[1]) - relative_error(other[1], one[1])) < 1e-4
    flat = [torch.cat([d.flatten(1) for d in lora.delta()], 1) for lora in (one, other)]
    torch.testing.assert_close(cosine, torch.cosine_similarity(*flat, dim=-1), rtol=1e-4, atol=1e-5)


def test_copies_are_near_and_alike() -> None:
    training, others = torch.randn(20, 50), torch.randn(5, 50)
    near = nearest(torch.cat([training[:3] * 2, others]), training)
    assert near[:3].allclose(torch.ones(3)) and near[3:].max() < 0.9
    assert abs(spread(training[:4, None].expand(-1, 3, -1))) < 1e-5
    assert spread(training.view(4, 5, 50)) > 0.8


def test_codecs_and_models_on_held_out_rows(bundle: Any, tmp_path: Path) -> None:
    recipe = Recipe(str(bundle.base), preset="attention", rank=2, steps=1, at_once=4)
    for name, first in (("train", 0), ("others", 1_000_000)):
        write_plan(make_plan(Avatars(first, first + 4, each=2, size=16), recipe), tmp_path / name)
        run(tmp_path / name)
    base, reader = load_base(bundle.base), Reader.from_pretrained(bundle.evaluator)

    def judge(benchmark: Benchmark) -> Judge:
        return Judge(base, reader, benchmark, steps=1)

    prompts = [Prompt("a portrait of sks person", {"expression": "sad"})]
    trial = held_out(tmp_path / "train", tmp_path / "others", judge, prompts, base.resolution, 3)
    assert trial.judge.benchmark.names == ("person-1000000", "person-1000001", "person-1000002")
    original = trial.original()
    data = LoraDataset(tmp_path / "train", "train")
    codec = LoraCodec.of_principal_components(data, 1, 3)
    own = held_out(tmp_path / "train", tmp_path / "train", judge, prompts, base.resolution, 4, "train")
    kept = own.decoded("codec", codec, own.original())  # four rows lie in three directions
    assert kept.error is not None and kept.error < 0.02
    assert kept.nearest is not None and kept.nearest > 0.99
    decoded = trial.decoded("codec", codec, original)
    assert decoded.nearest is not None and decoded.error is not None and decoded.error > kept.error
    assert decoded.compression == data.layout.numel / 3
    assert decoded.kept == decoded.row.identity.mean / original.row.identity.mean
    sampled = trial.sampled("one pass", ImageToLora.from_pretrained(str(bundle.model)), original, Sampling(), 2)
    assert sampled.spread is not None and abs(sampled.spread) < 1e-4  # nothing is left to chance
    lines = list(table([original, decoded, replace(sampled, nearest=None)]))
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
