"""Tiny models of the real classes, and a tiny bundle of released models on disk."""

import gc
import json
import os
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported; tests use no network
if "PYTEST_XDIST_WORKER" in os.environ:  # two workers on two cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # each process would compile all libraries
    sys.dont_write_bytecode = False

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

SLOWEST_FILES = ("test_configs.py", "test_examples.py", "test_build.py", "test_compute_options.py")
"""Files that run first, so that no worker runs one of them alone at the end."""


def pytest_collection_finish() -> None:
    """Keep the garbage collector off the millions of objects of libraries and of the tests."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest files first."""
    ranks = {name: rank for rank, name in enumerate(SLOWEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def make_tiny_unet(in_channels: int = 4) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        in_channels=in_channels,
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).requires_grad_(False)


def make_tiny_text_encoder(
    vocab_size: int = 50, max_length: int = 16, bos_token_id: int = 0, eos_token_id: int = 1
) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=max_length,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )
    return CLIPTextModel(config).eval().requires_grad_(False)


def make_tiny_pipeline(
    unet: nn.Module, text_encoder: nn.Module, tokenizer: Any = None, num_vae_blocks: int = 1
) -> Any:
    """Stable Diffusion on 8x8 latents; each VAE block after the first doubles the pixels."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(8,) * num_vae_blocks,
        down_block_types=("DownEncoderBlock2D",) * num_vae_blocks,
        up_block_types=("UpDecoderBlock2D",) * num_vae_blocks,
        norm_num_groups=4,
        latent_channels=4,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def unet() -> nn.Module:
    return make_tiny_unet()


@pytest.fixture
def text_encoder() -> nn.Module:
    return make_tiny_text_encoder()


@pytest.fixture
def pipe(unet: nn.Module, text_encoder: nn.Module) -> Any:
    return make_tiny_pipeline(unet, text_encoder)


@pytest.fixture
def transformer() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(2)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    ).requires_grad_(False)


@dataclass(frozen=True)
class Bundle:
    """Folders of a tiny ``checkpoints/avatars`` with 16x16 images; read-only, shared by tests."""

    base: Path
    model: Path
    evaluator: Path
    benchmark: Path
    edit_base: Path
    pair_model: Path
    edit_benchmark: Path

    @property
    def subjects(self) -> Path:
        return self.benchmark / "subjects"

    @property
    def photo(self) -> Path:
        return self.subjects / "person-0" / "0.png"


ATTRIBUTES = {"expression": ["smiling", "sad"], "glasses": ["none", "round glasses"]}
_BACKBONE = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("tiny")
    names = (
        "base",
        "image-to-lora",
        "evaluator",
        "test",
        "edit-base",
        "pair-to-lora",
        "test-edits",
    )
    bundle = Bundle(*(root / name for name in names))
    _save_base(bundle.base)
    _save_model(bundle)
    _save_evaluator(bundle.evaluator)
    _save_benchmark(bundle.benchmark)
    _save_edit_base(bundle)
    _save_pair_model(bundle)
    _save_edit_benchmark(bundle.edit_benchmark)
    return bundle


@pytest.fixture(scope="session")
def lora_diffusion_dir(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ``LoraDiffusion`` for the bundled base, whose LoRAs differ by photo and seed."""
    from hyperlora.lora.normalization import LoraNormalizer
    from hyperlora.models.image_feature_mixer import MixedImageFeatures
    from hyperlora.models.lora_dit import LoraDiT
    from hyperlora.models.lora_pca import FactorwiseLoraPCA
    from hyperlora.pipelines.image_to_lora import ImageToLora
    from hyperlora.pipelines.lora_codec import LoraCodec
    from hyperlora.pipelines.lora_diffusion import FACE_EMBED_DIM, LoraDiffusion
    from hyperlora.pipelines.model_card import ModelCard

    image_to_lora = ImageToLora.from_pretrained(str(bundle.model))
    torch.manual_seed(8)
    components = FactorwiseLoraPCA(image_to_lora.layout, 2, 3, components_per_factor=3)
    components.fit(torch.randn(12, image_to_lora.layout.numel))
    codec = LoraCodec(LoraNormalizer(image_to_lora.layout), components)
    mixture = MixedImageFeatures(
        FACE_EMBED_DIM,
        image_to_lora.encoder.width,
        width=16,
        num_tokens=2,
        num_heads=2,
        mode="image",
    )
    denoiser = LoraDiT(*codec.latent_shape, 16, width=16, depth=1, num_heads=2)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("lora-diffusion")
    card = ModelCard(num_inference_steps=3, resolution=16, architecture="stable-diffusion-v1")
    LoraDiffusion(image_to_lora.encoder, mixture, denoiser, codec, None, card).save_pretrained(
        folder
    )
    return folder


def _save_base(folder: Path) -> None:
    from transformers import CLIPTokenizer

    bos_token, eos_token = "<|startoftext|>", "<|endoftext|>"
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), bos_token, eos_token]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=48
    )
    text_encoder = make_tiny_text_encoder(
        len(tokens), 48, tokens.index(bos_token), tokens.index(eos_token)
    )
    make_tiny_pipeline(make_tiny_unet(), text_encoder, tokenizer, num_vae_blocks=2).save_pretrained(
        folder
    )


def _save_model(bundle: Bundle) -> None:
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.diffusion.target_modules import make_layout
    from hyperlora.encoders.timm_encoder import TimmEncoder
    from hyperlora.models.hypernetwork import Hypernetwork
    from hyperlora.pipelines.image_to_lora import ImageToLora
    from hyperlora.pipelines.model_card import ModelCard

    base = load_diffusion_base(bundle.base)
    torch.manual_seed(4)
    encoder = TimmEncoder("vit_tiny_patch16_224", image_size=16, options=_BACKBONE)
    layout = make_layout({"unet": base.denoiser}, "attention", 2, base.id)
    network = Hypernetwork(
        layout,
        encoder.width,
        width=16,
        depth=1,
        num_heads=2,
        head="basis",
        head_options={"size": 4},
    )
    with torch.no_grad():
        # zero at initialization, where every photo gives the same LoRA
        network.code_proj.normal_(std=0.1)
    card = ModelCard(trigger_phrase="sks person", resolution=16, architecture="stable-diffusion-v1")
    ImageToLora(encoder, network, card).save_pretrained(bundle.model)


def _save_evaluator(folder: Path) -> None:
    from hyperlora.encoders.attribute_classifier import AttributeClassifier

    torch.manual_seed(5)
    scale = (0.1, 0.9)
    AttributeClassifier(
        "vit_tiny_patch16_224", 16, ATTRIBUTES, ["age"], 8, _BACKBONE, scale
    ).save_pretrained(folder)


def _save_benchmark(folder: Path, num_subjects: int = 4, num_photos: int = 4) -> None:
    """Every subject has its own color gradient, every photo its own noise."""
    random = np.random.default_rng(0)
    for s in range(num_subjects):
        subject_dir = folder / "subjects" / f"person-{s}"
        subject_dir.mkdir(parents=True)
        corners = random.uniform(0, 255, (2, 2, 3))
        face = np.asarray(Image.fromarray(corners.astype(np.uint8)).resize((24, 24)), float)
        for p in range(num_photos):
            noisy = (face + random.normal(0, 12, face.shape)).clip(0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(subject_dir / f"{p}.png")
    prompts = [
        {
            "prompt": "a portrait of sks person, smiling",
            "truth": {"expression": "smiling", "glasses": "none"},
        },
        {
            "prompt": "a portrait of sks person, round glasses",
            "truth": {"glasses": "round glasses"},
        },
    ]
    (folder / "prompts.json").write_text(json.dumps(prompts))


def _save_edit_base(bundle: Bundle) -> None:
    from hyperlora.training.modules.instruct_pix2pix import save_edit_pipeline

    save_edit_pipeline(bundle.edit_base, bundle.base, make_tiny_unet(8))


def _save_pair_model(bundle: Bundle) -> None:
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.diffusion.target_modules import make_layout
    from hyperlora.encoders.timm_encoder import TimmEncoder
    from hyperlora.models.pair_hypernetwork import PairHypernetwork
    from hyperlora.pipelines.model_card import ModelCard
    from hyperlora.pipelines.pair_to_lora import PairToLora

    base = load_diffusion_base(bundle.edit_base)
    torch.manual_seed(7)
    encoder = TimmEncoder("vit_tiny_patch16_224", image_size=16, options=_BACKBONE)
    layout = make_layout({"unet": base.denoiser}, "attention", 2, base.id)
    network = PairHypernetwork(
        layout,
        encoder.width,
        antisymmetric=True,
        width=16,
        depth=1,
        num_heads=2,
        head="basis",
        head_options={"size": 4},
    )
    with torch.no_grad():
        network.hypernetwork.code_proj.normal_(std=0.3)
    card = ModelCard(resolution=16, architecture="stable-diffusion-v1")
    PairToLora(encoder, network, card).save_pretrained(bundle.pair_model)


def _save_edit_benchmark(folder: Path) -> None:
    """Two edits, each with two example pairs and two test pairs: inverted, and darker."""
    random = np.random.default_rng(1)
    edits = {"inverted": lambda x: 255 - x, "darker": lambda x: x // 3}
    for name, edit_fn in edits.items():
        (folder / name).mkdir(parents=True)
        for stem in ("shown-0", "shown-1", "other-0", "other-1"):
            blocks = np.kron(random.integers(0, 256, (4, 4, 3)), np.ones((5, 5, 1)))
            before = blocks.astype(np.uint8)
            Image.fromarray(before).save(folder / name / f"{stem}_before.png")
            Image.fromarray(edit_fn(before)).save(folder / name / f"{stem}_after.png")
    facts = [
        {
            "name": "inverted",
            "kind": "negative",
            "group": "seen kinds",
            "instruction": "negative",
            "truth": {},
        },
        {
            "name": "darker",
            "kind": "glasses",
            "group": "unseen kinds",
            "instruction": "dark",
            "truth": {"glasses": "round glasses"},
        },
    ]
    (folder / "edits.json").write_text(json.dumps(facts))
