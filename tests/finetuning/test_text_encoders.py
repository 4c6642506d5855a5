"""LoRAs of text encoders: gradients reach them, and each subject's prompts meet its own LoRA."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.errors import InvalidArgumentError
from hyperlora.finetuning.config import FineTuneConfig
from hyperlora.finetuning.examples import TrainingExamples
from hyperlora.finetuning.refine import make_photo_examples
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.blocks import select_blocks
from hyperlora.lora.io.load import load_lora
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.parametrizations import make_parametrization
from hyperlora.lora.weights import LoraWeights
from tests.tiny_pipelines import get_tiny_pipeline

NAMES = ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"]
NUM_ENCODERS = {"stable_diffusion_xl": 2, "stable_diffusion_3": 2}
K = 2


def make_base(name: str) -> DiffusionBase:
    return DiffusionBase("tiny/base", get_tiny_pipeline(name).pipe)


def make_examples(base: DiffusionBase, prompt: str = "a red hat") -> TrainingExamples:
    photos = torch.rand(K, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return make_photo_examples(base, photos, prompt)


def fit(base: DiffusionBase, examples: TrainingExamples, num_steps: int = 3) -> LoraWeights:
    layout = base.make_layout("attention", 2, text_encoders=True)
    torch.manual_seed(0)
    init_loras = LoraWeights.zeros(layout, (K,), layout.init_std)
    return fine_tune_loras(
        base,
        examples,
        init_loras.flatten(),
        partial(LoraWeights.unflatten, layout),
        FineTuneConfig(num_steps=num_steps, lr=1e-2, seeds=range(K)),
    ).weights


@pytest.mark.parametrize("name", NAMES)
def test_fine_tune_loras_trains_text_encoders(name: str, tmp_path: Path) -> None:
    base = make_base(name)
    loras = fit(base, make_examples(base))
    text_components = loras.layout.components[1:]
    assert len(text_components) == NUM_ENCODERS.get(name, 1)
    for component in text_components:
        norms = select_blocks(loras, [component]).compute_delta_norms()  # [K, targets]
        assert (norms.sum(-1) > 1e-4).all()
    formats = ("diffusers", "kohya") if "xl" in name or name == NAMES[0] else ("diffusers",)
    for format in formats:
        path = save_lora(loras[0], tmp_path / f"{format}.safetensors", format=format)
        loaded = load_lora(path, modules=base.modules).weights
        assert loaded.layout.components == loras.layout.components
        for delta, expected in zip(
            loaded.get_delta_weights(), loras[0].get_delta_weights(), strict=True
        ):
            torch.testing.assert_close(delta, expected, atol=1e-3, rtol=1e-3)


def test_each_subject_meets_its_own_text_lora() -> None:
    base = make_base("stable_diffusion")
    examples = make_examples(base)
    other = make_examples(base)
    other.latents[1] = other.latents[1].flip(-1)
    loras, other_loras = fit(base, examples), fit(base, other)
    torch.testing.assert_close(loras[0].flatten(), other_loras[0].flatten(), atol=1e-5, rtol=1e-4)
    assert (loras[1].flatten() - other_loras[1].flatten()).abs().max() > 1e-3


def test_lidb_adapts_text_encoders() -> None:
    base = make_base("stable_diffusion")
    layout = base.make_layout("attention", 1, text_encoders=True)
    lidb = make_parametrization("lidb", layout)
    codes = lidb.init_codes(torch.Generator().manual_seed(0)).expand(K, -1)
    config = FineTuneConfig(num_steps=4, lr=5e-2, seeds=range(K))
    loras = fine_tune_loras(base, make_examples(base), codes, lidb, config).weights
    norms = select_blocks(loras, ["text_encoder"]).compute_delta_norms()
    assert (norms.sum(-1) > 1e-5).all()


@pytest.mark.parametrize("name", ["z_image", "flux2_klein", "qwen_image", "chroma"])
def test_text_encoders_that_take_no_lora_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="take no LoRA: only those of CLIP do"):
        make_base(name).make_layout("attention", 2, text_encoders=True)


def test_gradients_flow_only_where_they_are_asked_for() -> None:
    base: Any = make_base("stable_diffusion")
    layout = base.make_layout("attention", 2, text_encoders=True)
    flat = (0.1 * torch.randn(layout.numel)).requires_grad_()
    with base.inject_lora(LoraWeights.unflatten(layout, flat)):
        assert not base.encode_prompts(["a"])["prompt_embeds"].requires_grad
        embeds = base.encode_prompts(["a"], requires_grad=True)["prompt_embeds"]
    (gradient,) = torch.autograd.grad(embeds.square().sum(), flat)
    assert gradient.abs().max() > 0


def test_hypernetwork_training_reaches_text_encoders(bundle: Any, tmp_path: Path) -> None:
    from hyperlora.training.batches import SubjectBatch
    from hyperlora.training.modules.hypernetwork import HypernetworkTraining

    sizes = {"width": 16, "depth": 1, "num_heads": 2, "head_options": {"size": 4}}
    module = HypernetworkTraining(
        base=str(bundle.base),
        encoder="vit_tiny_patch16_224",
        encoder_options={
            "image_size": 16,
            "options": {
                "img_size": 16,
                "patch_size": 8,
                "embed_dim": 16,
                "depth": 1,
                "num_heads": 2,
            },
        },
        output_dir=str(tmp_path),
        text_encoders=True,
        hypernetwork=sizes,
    )
    torch.nn.init.normal_(module.model.hypernetwork.code_proj, std=0.3)
    assert module.model.layout.components == ("unet", "text_encoder")
    batch = SubjectBatch(
        captions=["a red hat", "a dog"],
        subject_ids=torch.arange(2),
        photos=torch.rand(2, 1, 3, 16, 16),
        images=torch.rand(2, 3, 16, 16),
    )
    weights = module.model.forward(batch.photos)
    factors = [
        factor
        for target, factor in zip(weights.layout.targets, weights.up, strict=True)
        if target.component == "text_encoder"
    ]
    with module.base.inject_lora(weights):
        loss = module._compute_denoising_loss(batch)
    gradients = torch.autograd.grad(loss, factors)
    assert all(gradient.abs().amax((1, 2)).min() > 0 for gradient in gradients)  # of each subject
