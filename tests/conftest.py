"""Tiny models of the real classes, built from config; and a whole tiny bundle on disk, as users and verbs meet it."""

import json
import os
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # before huggingface_hub is imported: no test may reach for the network
)
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # two workers on two cores: more threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

LONGEST = ("test_readme.py", "test_configs.py")
"""Files that begin first, so that no worker is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
        )
    )


def tiny_unet(in_channels: int = 4) -> nn.Module:
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


def tiny_text_encoder(words: int = 50, length: int = 16, start: int = 0, end: int = 1) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=start,
        eos_token_id=end,
    )
    return CLIPTextModel(config).eval().requires_grad_(False)


def tiny_pipeline(
    unet: nn.Module, text_encoder: nn.Module, tokenizer: Any = None, vae_blocks: int = 1
) -> Any:
    """Stable Diffusion on 8x8 latents; each autoencoder block after the first doubles the pixels."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(8,) * vae_blocks,
        down_block_types=("DownEncoderBlock2D",) * vae_blocks,
        up_block_types=("UpDecoderBlock2D",) * vae_blocks,
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
    return tiny_unet()


@pytest.fixture
def text_encoder() -> nn.Module:
    return tiny_text_encoder()


@pytest.fixture
def pipe(unet: nn.Module, text_encoder: nn.Module) -> Any:
    return tiny_pipeline(unet, text_encoder)


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
    """Folders of a tiny ``checkpoints/draw_portraits``; ``base`` draws 16x16 pixels. Read-only: tests share it."""

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
    made = Bundle(*(root / name for name in names))
    _save_base(made.base)
    _save_model(made)
    _save_evaluator(made.evaluator)
    _save_benchmark(made.benchmark)
    _save_edit_base(made)
    _save_pair_model(made)
    _save_edit_benchmark(made.edit_benchmark)
    return made


@pytest.fixture(scope="session")
def difflora(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ``LoraDiffusion`` over the bundle's base, whose LoRAs differ by photo and by seed."""
    from hyperlora.lora.normalization import LoraNormalizer
    from hyperlora.models.image_feature_mixer import MixedImageFeatures
    from hyperlora.models.lora_dit import LoraDiT
    from hyperlora.models.lora_pca import FactorwiseLoraPCA
    from hyperlora.pipelines.image_to_lora import ImageToLora
    from hyperlora.pipelines.lora_codec import LoraCodec
    from hyperlora.pipelines.lora_diffusion import FACE_EMBED_DIM, LoraDiffusion

    other = ImageToLora.from_pretrained(str(bundle.model))
    torch.manual_seed(8)
    components = FactorwiseLoraPCA(other.layout, 2, 3, components_per_factor=3)
    components.fit(torch.randn(12, other.layout.numel))
    codec = LoraCodec(LoraNormalizer(other.layout), components)
    mixture = MixedImageFeatures(
        FACE_EMBED_DIM, other.encoder.width, width=16, num_tokens=2, num_heads=2, mode="image"
    )
    denoiser = LoraDiT(*codec.latent_shape, 16, width=16, depth=1, num_heads=2)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("difflora")
    LoraDiffusion(
        other.encoder, mixture, denoiser, codec, None, {"steps": 3, "resolution": 16}
    ).save_pretrained(folder)
    return folder


def _save_base(folder: Path) -> None:
    from transformers import CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    words = [*letters, *(f"{letter}</w>" for letter in letters), start, end]
    tokenizer = CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=48
    )
    text_encoder = tiny_text_encoder(len(words), 48, words.index(start), words.index(end))
    tiny_pipeline(tiny_unet(), text_encoder, tokenizer, vae_blocks=2).save_pretrained(folder)


def _save_model(made: Bundle) -> None:
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.diffusion.target_modules import make_layout
    from hyperlora.encoders.timm_encoder import TimmEncoder
    from hyperlora.models.hypernetwork import Hypernetwork
    from hyperlora.pipelines.image_to_lora import ImageToLora

    base = load_diffusion_base(made.base)
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
        network.code_proj.normal_(
            std=0.1
        )  # zero at initialisation: every photo would give the same LoRA
    ImageToLora(
        encoder, network, {"trigger_phrase": "sks person", "resolution": 16}
    ).save_pretrained(made.model)


def _save_evaluator(folder: Path) -> None:
    from hyperlora.encoders.attribute_classifier import AttributeClassifier

    torch.manual_seed(5)
    scale = (0.1, 0.9)
    AttributeClassifier(
        "vit_tiny_patch16_224", 16, ATTRIBUTES, ["age"], 8, _BACKBONE, scale
    ).save_pretrained(folder)


def _save_benchmark(folder: Path, subjects: int = 4, photos: int = 4) -> None:
    """Every subject has a colour gradient of its own, every photo its own noise."""
    random = np.random.default_rng(0)
    for s in range(subjects):
        person = folder / "subjects" / f"person-{s}"
        person.mkdir(parents=True)
        corners = random.uniform(0, 255, (2, 2, 3))
        face = np.asarray(Image.fromarray(corners.astype(np.uint8)).resize((24, 24)), float)
        for p in range(photos):
            noisy = (face + random.normal(0, 12, face.shape)).clip(0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(person / f"{p}.png")
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


def _save_edit_base(made: Bundle) -> None:
    from hyperlora.training.modules.instruct_pix2pix import save_edit_pipeline

    save_edit_pipeline(made.edit_base, made.base, tiny_unet(8))


def _save_pair_model(made: Bundle) -> None:
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.diffusion.target_modules import make_layout
    from hyperlora.encoders.timm_encoder import TimmEncoder
    from hyperlora.models.pair_hypernetwork import PairHypernetwork
    from hyperlora.pipelines.pair_to_lora import PairToLora

    base = load_diffusion_base(made.edit_base)
    torch.manual_seed(7)
    encoder = TimmEncoder("vit_tiny_patch16_224", image_size=16, options=_BACKBONE)
    layout = make_layout({"unet": base.denoiser}, "attention", 2, base.id)
    network = PairHypernetwork(
        layout,
        encoder.width,
        antisymmetric=True,
        width=16,
        depth=1,
        heads=2,
        head="basis",
        head_options={"size": 4},
    )
    with torch.no_grad():
        network.hypernetwork.code_proj.normal_(std=0.3)
    PairToLora(encoder, network, {"resolution": 16}).save_pretrained(made.pair_model)


def _save_edit_benchmark(folder: Path) -> None:
    """Two edits, each shown twice and asked for on two pictures: inverted, and darker."""
    random = np.random.default_rng(1)
    edits = {"inverted": lambda x: 255 - x, "darker": lambda x: x // 3}
    for name, change in edits.items():
        (folder / name).mkdir(parents=True)
        for stem in ("shown-0", "shown-1", "other-0", "other-1"):
            before = np.kron(random.integers(0, 256, (4, 4, 3)), np.ones((5, 5, 1))).astype(
                np.uint8
            )
            Image.fromarray(before).save(folder / name / f"{stem}_before.png")
            Image.fromarray(change(before)).save(folder / name / f"{stem}_after.png")
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
