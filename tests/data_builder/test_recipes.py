"""Recipes: parametrizations, initializations, prior preservation, precision, base models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_builder.build.make_plan import make_plan
from data_builder.build.plan import Recipe, read_plan, write_plan
from data_builder.build.run import run_build
from data_builder.build.subject_data import load_subject
from data_builder.build.trainer import ChunkTrainer
from data_builder.sources.sources import (
    FolderSource,
)
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.lora.weights import LoraWeights


def read_chunks(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted((folder / "chunks").iterdir())}


@pytest.mark.parametrize("parametrization", ["locon", "lidb", "loha", "lokr"])
def test_parametrizations_lower_the_loss(
    tmp_path: Path, parametrization: str, build_dataset: Callable[..., LoraDataset]
) -> None:
    dataset = build_dataset(
        tmp_path,
        parametrization=parametrization,
        rank=4,
        finetune_steps=12,
        lr=3e-3,
        subjects_per_batch=6,
    )
    assert dataset.layout.rank == 4 and len(dataset) == 6
    assert any(s.kernel_size for s in dataset.layout.targets) == (parametrization == "locon")
    assert all(r.best_loss < r.initial_loss for r in dataset.records)  # type: ignore[operator]
    assert float(dataset.get_weights(range(6)).compute_delta_norms().sum(-1).min()) > 0


def test_init_methods_give_expected_codes(
    bundle: Any,
    photos: Path,
    tmp_path: Path,
    make_recipe: Callable[..., Recipe],
    build_dataset: Callable[..., LoraDataset],
) -> None:
    plain = build_dataset(tmp_path / "shared", finetune_steps=2)
    for init, source in (
        ("zero", ""),
        ("mean", str(tmp_path / "shared")),
        ("network", str(bundle.model)),
    ):
        write_plan(
            make_plan(FolderSource(str(photos)), make_recipe(init=init, init_from=source)),
            tmp_path / init,
        )
    base, plan = load_diffusion_base(bundle.base), read_plan(tmp_path / "mean")
    init_codes = ChunkTrainer(plan, base).init_codes(plan.get_chunk(0), [])
    mean = plain.get_weights(range(6)).mean()
    for actual, expected in zip(
        LoraWeights.unflatten(plain.layout, init_codes)[0].get_delta_weights(),
        mean.get_delta_weights(),
        strict=True,
    ):
        assert torch.allclose(actual, expected, atol=1e-6)
    plan = read_plan(tmp_path / "zero")
    zero = ChunkTrainer(plan, base).init_codes(plan.get_chunk(0), [])
    assert not torch.equal(zero[0], zero[1])
    run_build(tmp_path / "network")
    network = LoraDataset(tmp_path / "network")
    assert float(network.get_weights(0).compute_delta_norms().min()) > 0, (
        "a network's LoRA changes every target"
    )
    shared = ChunkTrainer(read_plan(tmp_path / "shared"), base).init_codes(plan.get_chunk(0), [])
    assert torch.equal(shared[0], shared[1])


def test_init_network_keeps_predicted_factors(
    bundle: Any, photos: Path, make_recipe: Callable[..., Recipe]
) -> None:
    """Not only the same ΔW: the factors of an SVD have nothing in common from row to row."""
    plan = make_plan(
        FolderSource(str(photos)), make_recipe(init="network", init_from=str(bundle.model))
    )
    trainer = ChunkTrainer(plan, load_diffusion_base(bundle.base))
    assert trainer.network is not None
    subjects = [load_subject(row, trainer.source, trainer.base, plan.recipe) for row in plan.rows]
    expected = [trainer.network.forward(subject.pixels[None]).flatten() for subject in subjects]
    torch.testing.assert_close(trainer.init_codes(plan.rows, subjects), torch.cat(expected))


def test_recipe_options_change_examples_and_rows(
    bundle: Any,
    photos: Path,
    tmp_path: Path,
    make_recipe: Callable[..., Recipe],
    build_dataset: Callable[..., LoraDataset],
) -> None:
    from data_builder.build.subject_data import load_subject, make_class_prompts

    options = {
        "num_class_images": 3,
        "prompt_templates": ("a photo of {}", "{} at sea"),
        "num_crops": 2,
        "num_val_photos": 1,
    }
    plan = make_plan(
        FolderSource(str(photos)),
        make_recipe(**options, identifier="ohwx dog", class_noun="a dog"),
    )
    base = load_diffusion_base(bundle.base)
    assert make_class_prompts(plan.recipe) == [
        "a photo of a dog",
        "a dog at sea",
        "a photo of a dog",
    ]
    first = load_subject(plan.rows[0], FolderSource(str(photos)), base, plan.recipe)
    assert first.train_examples.latents.shape[:2] == (1, 2), (
        "one training photo, two crops, under its own caption"
    )
    assert first.val_examples.latents.shape[:2] == (1, 2), (
        "one validation photo, under both templates"
    )
    second = load_subject(plan.rows[1], FolderSource(str(photos)), base, plan.recipe)
    assert second.train_examples.latents.shape[1] == 4, (
        "a single photo trains and validates: two crops, two templates"
    )
    write_plan(plan, tmp_path)
    run_build(tmp_path)
    class_latents = (tmp_path / "class.safetensors").read_bytes()
    without = build_dataset(
        tmp_path / "without",
        **{**options, "num_class_images": 0},
        identifier="ohwx dog",
    )
    assert not torch.allclose(LoraDataset(tmp_path)[0], without[0])
    (tmp_path / "chunks" / "000001.safetensors").unlink()
    before = read_chunks(tmp_path)
    run_build(tmp_path)
    assert (tmp_path / "class.safetensors").read_bytes() == class_latents
    assert all(read_chunks(tmp_path)[name] == data for name, data in before.items())


def test_run_build_supports_bfloat16_and_checkpointing(
    tmp_path: Path, build_dataset: Callable[..., LoraDataset]
) -> None:
    plain = build_dataset(tmp_path / "a")
    checkpointed = build_dataset(tmp_path / "b", gradient_checkpointing=True)
    half = build_dataset(tmp_path / "c", dtype="bfloat16", storage_dtype="bfloat16")
    assert torch.allclose(checkpointed[0], plain[0], atol=1e-4)
    assert half[0].dtype == torch.bfloat16 and torch.allclose(half[0].float(), plain[0], atol=0.05)
    assert half.records[0].best_loss < half.records[0].initial_loss * 1.01  # type: ignore[operator]


def test_run_build_supports_sdxl(
    bundle: Any, photos: Path, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    pipe = StableDiffusionPipeline.from_pretrained(bundle.base)
    torch.manual_seed(6)
    unet = UNet2DConditionModel.from_config(
        pipe.unet.config,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    text_encoder_2 = CLIPTextModelWithProjection(
        CLIPTextConfig(**pipe.text_encoder.config.to_dict() | {"projection_dim": 16})
    )
    parts = (
        pipe.vae,
        pipe.text_encoder,
        text_encoder_2,
        pipe.tokenizer,
        pipe.tokenizer,
        unet,
        pipe.scheduler,
    )
    xl = StableDiffusionXLPipeline(*parts, add_watermarker=False)
    xl.to(torch.float16).save_pretrained(tmp_path / "tiny" / "xl", variant="fp16")
    options = {
        "base": str(tmp_path / "tiny" / "xl"),
        "variant": "fp16",
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
    }
    plan = make_plan(
        FolderSource(str(photos)),
        replace(make_recipe(finetune_steps=8, num_class_images=2), **options),
        num_subjects=3,
    )
    write_plan(plan, tmp_path / "build")
    run_build(tmp_path / "build")
    dataset = LoraDataset(tmp_path / "build")
    assert dataset.layout.base == "tiny/xl" and len(dataset) == 3
    assert all(r.best_loss < r.initial_loss for r in dataset.records)  # type: ignore[operator]
