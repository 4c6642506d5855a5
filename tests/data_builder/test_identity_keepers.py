"""Identity keepers draw what ``generate_images`` and diffusers draw."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_builder.people.identity_keeper import SamplingConfig
from data_builder.people.ip_adapter_keeper import ADAPTER_SCALE, IpAdapterKeeper
from data_builder.people.lora_keeper import LoraKeeper
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.diffusion.negative_lora import inject_lora_by_branch
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.errors import InvalidArgumentError, LayoutMismatchError, ModelLoadError
from hyperlora.lora.io.prompt_prefix import PROMPT_PREFIX_KEY
from hyperlora.pipelines.auto import load_photo_model
from hyperlora.pipelines.image_to_lora import ImageToLora
from tests.tiny_pipelines.unets import make_stable_diffusion, make_stable_diffusion_xl

SAMPLING = SamplingConfig(2, 3.0)
PROMPTS, SEEDS = [f"face {i}" for i in range(6)], list(range(6))


def count_differences(images: list[Image.Image], others: list[Image.Image]) -> int:
    return sum(not np.array_equal(a, b) for a, b in zip(images, others, strict=True))


def max_difference(images: list[Image.Image], others: list[Image.Image]) -> int:
    return int(np.abs(np.stack(images).astype(int) - np.stack(others)).max())


def test_lora_keeper_draws_with_the_lora_of_the_reference(bundle: Any) -> None:
    base = load_diffusion_base(bundle.base)
    model = load_photo_model(bundle.model, base=base)
    keeper = LoraKeeper(base, model, SAMPLING)
    reference = Image.open(bundle.photo).convert("RGB")
    sampling = {"num_inference_steps": 2, "guidance_scale": 3.0}
    images = keeper.draw_images(PROMPTS, SEEDS, reference)
    lora = model(reference).weights
    expected = generate_images(base, PROMPTS, lora, seeds=SEEDS, **sampling)
    assert max_difference(images, expected) <= 1  # two batches
    plain = keeper.draw_images(PROMPTS, SEEDS)
    assert max_difference(plain, generate_images(base, PROMPTS, seeds=SEEDS, **sampling)) <= 1
    assert count_differences(images, plain) == 6
    assert keeper.make_prompt("a man", "smiling") == "a portrait of sks person, smiling"


def test_lora_keeper_follows_the_rules_of_released_models(bundle: Any) -> None:
    """A prefix of prompts, no LoRA on the negative branch, and a recommended strength."""

    class RuledModel(ImageToLora):
        def make_metadata(self, title: str, images: Any, **extra: str) -> Any:
            keys = {PROMPT_PREFIX_KEY: "fcsks fxhks, ", "hyperlora.negative_lora": "off"}
            metadata = super().make_metadata(title, images, **keys, **extra)
            object.__setattr__(metadata, "recommended_strength", 0.5)
            return metadata

    base = load_diffusion_base(bundle.base)
    model = RuledModel.from_pretrained(str(bundle.model))
    keeper = LoraKeeper(base, model, SAMPLING)
    assert keeper.make_prompt("a man", "smiling") == "fcsks fxhks, a portrait of a man, smiling"
    reference = Image.open(bundle.photo).convert("RGB")
    with inject_lora_by_branch(base.pipeline, model(reference).weights * 0.5):
        expected = generate_images(
            base, PROMPTS, seeds=SEEDS, num_inference_steps=2, guidance_scale=3.0
        )
    assert max_difference(keeper.draw_images(PROMPTS, SEEDS, reference), expected) <= 1


def test_lora_keeper_refuses_another_base(bundle: Any) -> None:
    base = DiffusionBase("other/base", load_diffusion_base(bundle.base).pipeline)
    with pytest.raises(LayoutMismatchError, match="other/base"):
        LoraKeeper(base, load_photo_model(bundle.model), SAMPLING)
    edit_base = load_diffusion_base(bundle.edit_base)
    with pytest.raises(InvalidArgumentError, match="from a prompt alone"):
        LoraKeeper(edit_base, load_photo_model(bundle.model), SAMPLING)


def write_ip_adapter(folder: Path, pipe: Any, name: str = "ip-adapter_tiny.safetensors") -> Path:
    """A random IP-Adapter for a pipeline, in the authors' format, with its image encoder."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(11)
    width, embed_width, unet = pipe.unet.config.cross_attention_dim, 12, pipe.unet
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=embed_width,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * width, embed_width),
        "image_proj.proj.bias": torch.randn(4 * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    names = [n for n in unet.attn_processors if n.endswith("attn2.processor")]
    for i, processor in enumerate(names):
        attention = unet.get_submodule(processor.removesuffix(".processor"))
        for key in ("to_k_ip", "to_v_ip"):
            shape = (attention.to_q.in_features, width)
            tensors[f"ip_adapter.{2 * i + 1}.{key}.weight"] = torch.randn(shape)
    save_file(tensors, folder / name)
    return folder


@pytest.fixture
def tiny_base() -> DiffusionBase:
    pipe = make_stable_diffusion().pipe
    pipe.set_progress_bar_config(disable=True)
    return DiffusionBase("tiny/sd", pipe)


def test_ip_adapter_keeper_draws_as_diffusers_does(
    tiny_base: DiffusionBase, tmp_path: Path
) -> None:
    plain = generate_images(
        tiny_base, PROMPTS[:2], seeds=SEEDS[:2], num_inference_steps=2, guidance_scale=3.0
    )
    folder = write_ip_adapter(tmp_path, tiny_base.pipeline)
    keeper = IpAdapterKeeper(tiny_base, str(folder), SAMPLING)
    references = [Image.new("RGB", (20, 24), color) for color in ("red", "blue")]
    images, other_images = (keeper.draw_images(PROMPTS[:2], SEEDS[:2], r) for r in references)
    assert count_differences(images, other_images) == count_differences(images, plain) == 2
    # without a reference the adapter has no effect
    assert max_difference(keeper.draw_images(PROMPTS[:2], SEEDS[:2]), plain) <= 1
    assert keeper.make_prompt("a man", "smiling") == "a portrait of a man, smiling"

    pipe = make_stable_diffusion().pipe
    pipe.load_ip_adapter(str(folder), subfolder="", weight_name="ip-adapter_tiny.safetensors")
    pipe.set_ip_adapter_scale(ADAPTER_SCALE)
    expected = pipe(
        PROMPTS[1],
        ip_adapter_image=references[0],
        width=tiny_base.resolution,
        height=tiny_base.resolution,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(SEEDS[1]),
    ).images
    assert max_difference(images[1:], expected) <= 1


def test_ip_adapter_keeper_names_what_it_cannot_load(
    tiny_base: DiffusionBase, bundle: Any, tmp_path: Path
) -> None:
    folder = write_ip_adapter(tmp_path / "adapter", tiny_base.pipeline)
    xl_base = DiffusionBase("tiny/xl", make_stable_diffusion_xl().pipe)
    with pytest.raises(ModelLoadError, match="cannot be loaded into base 'tiny/xl'"):
        IpAdapterKeeper(xl_base, str(folder), SAMPLING)
    (folder / "second.safetensors").write_bytes(b"")
    (folder / "pickle.bin").write_bytes(b"")
    for name, message in (
        (str(folder), "holds 2 .safetensors files"),
        (f"{folder}:pickle.bin", "is no .safetensors file"),
        (f"{folder}:ip-adapter-faceid_sd15.safetensors", "FaceID"),
        (f"{folder}:nothing.safetensors", "cannot be loaded"),
        (f"{folder}:second.safetensors", "cannot be loaded"),
        ("org/adapter", "not in the cache of the hub"),
        (str(tmp_path / "nowhere"), "there is no IP-Adapter"),
    ):
        with pytest.raises((InvalidArgumentError, ModelLoadError), match=message):
            IpAdapterKeeper(tiny_base, name, SAMPLING)
    assert IpAdapterKeeper(tiny_base, f"{folder}:ip-adapter_tiny.safetensors", SAMPLING)
    with pytest.raises(InvalidArgumentError, match="leave --offload out"):
        IpAdapterKeeper(
            DiffusionBase("tiny/sd", tiny_base.pipeline, "model"), str(folder), SAMPLING
        )
    with pytest.raises(InvalidArgumentError, match="from a prompt alone"):
        IpAdapterKeeper(load_diffusion_base(bundle.edit_base), str(folder), SAMPLING)
