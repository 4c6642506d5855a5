"""How each configuration is made small enough for a test, and what must run before it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file

from hyperlora import pretrained
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.attribute_classifier import AttributeClassifier
from hyperlora.encoders.face_networks import FaceDetector, FaceRecognizer
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.lora_codec import LoraCodec
from hyperlora.pipelines.lora_diffusion import LoraDiffusion
from hyperlora.pipelines.pair_to_lora import PairToLora
from tests.tiny_pipelines.base import SIDE

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in CONFIGS.glob("**/*.yaml")
    if path.name != "vocabulary.yaml"
)
FOUR_STEPS = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.strategy=auto",
    "--trainer.max_steps=4",
    "--trainer.limit_train_batches=2",
    "--trainer.accumulate_grad_batches=1",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--checkpoint.every_n_train_steps=2",
    "--checkpoint.save_top_k=-1",
]
SMALL_HYPERNETWORK = [
    f"--model.init_args.hypernetwork.{value}" for value in ("width=16", "depth=1", "num_heads=2")
]
SMALL_NETWORK = [
    f"--model.init_args.network.{value}" for value in ("width=16", "depth=1", "num_heads=2")
]
TINY_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
TINY_ENCODER = [
    "--model.init_args.encoder=vit_tiny_patch16_224",
    "--model.init_args.encoder_options=" + json.dumps({"image_size": 16, "options": TINY_VIT}),
    "--data.init_args.resolution=16",
    "--data.init_args.encoder_size=16",
]


def read_config(name: str) -> dict[str, Any]:
    """The configuration as it is, without the arguments of its rule."""
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


@dataclass(frozen=True)
class Rule:
    """How one configuration becomes small, and how its output is loaded."""

    load: Callable[[Path], Any]
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """Configurations and preparations that must run before."""
    frozen: tuple[str, ...] = ()
    """Prefixes of parameters that are not trained, besides frozen encoders."""


def _make_photo_rule(name: str, *arguments: str) -> Rule:
    return Rule(
        ImageToLora.from_pretrained,
        (
            f"--model.init_args.base=tiny/{name}",
            *TINY_ENCODER,
            *SMALL_HYPERNETWORK,
            "--data.init_args.batch_size=2",
            "--data.init_args.num_workers=0",
            *arguments,
        ),
    )


def _make_pair_rule(
    *arguments: str, base: str = "instruct_pix2pix", needs: tuple[str, ...] = ()
) -> Rule:
    return Rule(
        PairToLora.from_pretrained,
        (
            f"--model.init_args.base=tiny/{base}",
            *TINY_ENCODER,
            "--data.init_args.batch_size=2",
            "--data.init_args.num_workers=0",
            *arguments,
        ),
        needs,
    )


def _make_tiny_unet(first_width: int) -> tuple[str, ...]:
    return (
        f"--model.init_args.unet.block_out_channels=[{first_width},48,32]",
        "--model.init_args.unet.sample_size=4",
        "--model.init_args.text_encoder.hidden_size=32",
        "--model.init_args.text_encoder.intermediate_size=64",
        "--data.init_args.batch_size=4",
    )


_TINY_EDIT_UNET = (
    "--model.init_args.unet.block_out_channels=[32,48,16]",
    "--data.init_args.batch_size=4",
)


def _load_text_to_image(folder: Path) -> Any:
    """Load a trained base; plain diffusers gets one precision, whatever the files hold."""
    stored = load_file(folder / "text_encoder/model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {torch.float16}
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float32
    return load_diffusion_base(folder)


def _make_lora_autoencoder_rule(name: str) -> Rule:
    sizes = "{directions_per_factor: 4, latent_width: 4, width: 8}"
    arguments = (f"--model.init_args.autoencoder={sizes}", _TWO_SAMPLES)
    return Rule(LoraCodec.from_pretrained, arguments, (f"{name}-build",))


def _make_lora_diffusion_rule(name: str) -> Rule:
    arguments = (
        *TINY_ENCODER[:2],
        "--model.init_args.face_pack=null",
        "--model.init_args.mixture={width: 16, num_tokens: 4, mode: image}",
        "--model.init_args.denoiser={width: 16, depth: 1, num_heads: 2}",
        _TWO_SAMPLES,
    )
    return Rule(LoraDiffusion.from_pretrained, arguments, (f"{name}/lora_autoencoder",))


_SMALL_INSTRUCTION_HEAD = {
    **read_config("avatars/15_pair_instructions")["model"]["init_args"]["network"][
        "instruction_head"
    ],
    "cross_attention_dim": 32,
    "hidden_size": 32,
}
_TINY_RESOLUTION = f"--data.init_args.resolution={SIDE}"
_FOUR_IDENTITIES = "--data.init_args.identities_per_batch=4"
_FOUR_SAMPLES = "--data.init_args.batch_size=4"
_TWO_SAMPLES = "--data.init_args.batch_size=2"

RULES = {
    "avatars/01_vae": Rule(
        AutoencoderKL.from_pretrained,
        (
            "--model.init_args.config.block_out_channels=[4,8,8,16]",
            "--data.init_args.crop_size=16",
            _FOUR_SAMPLES,
        ),
        ("drawn",),
    ),
    "avatars/02_vae_refine": Rule(
        AutoencoderKL.from_pretrained, (_FOUR_SAMPLES,), ("avatars/01_vae",)
    ),
    "avatars/03_text_to_image": Rule(
        _load_text_to_image, _make_tiny_unet(16), ("avatars/02_vae_refine", "tokenizer")
    ),
    "avatars/04_text_to_image_wide": Rule(
        _load_text_to_image,
        (*_make_tiny_unet(32), "--model.init_args.unet.time_embedding_dim=64"),
        ("avatars/03_text_to_image",),
    ),
    "avatars/05_latent_classifier": Rule(
        AttributeClassifier.from_pretrained,
        (
            "--model.init_args.image_size=4",
            "--model.init_args.options.base_channels=16",
            _FOUR_IDENTITIES,
        ),
        ("avatars/02_vae_refine",),
    ),
    "avatars/06_text_to_image_attributes": Rule(
        _load_text_to_image,
        (*_make_tiny_unet(32), "--model.init_args.unet.time_embedding_dim=64"),
        ("avatars/04_text_to_image_wide", "avatars/05_latent_classifier"),
    ),
    "avatars/07_evaluator": Rule(
        AttributeClassifier.from_pretrained,
        ("--model.init_args.image_size=32", _FOUR_IDENTITIES),
        ("drawn",),
    ),
    "avatars/08_photo_encoder": Rule(
        AttributeClassifier.from_pretrained,
        ("--model.init_args.options.channels=[8,16,16,32]", _FOUR_IDENTITIES),
        ("drawn",),
    ),
    "avatars/09_face_detector": Rule(
        FaceDetector.from_pretrained, (_FOUR_SAMPLES, "--data.init_args.size=64"), ("drawn",)
    ),
    "avatars/10_face_recognizer": Rule(
        FaceRecognizer.from_pretrained, (_FOUR_SAMPLES,), ("drawn",)
    ),
    "avatars/11_hypernetwork": Rule(
        ImageToLora.from_pretrained,
        (*SMALL_HYPERNETWORK, _TWO_SAMPLES),
        ("avatars/06_text_to_image_attributes", "avatars/08_photo_encoder"),
    ),
    "avatars/12_lora_diffusion": Rule(
        LoraDiffusion.from_pretrained,
        (
            "--model.init_args.mixture={width: 16, num_tokens: 4}",
            "--model.init_args.denoiser={width: 16, depth: 1, num_heads: 2}",
            _TWO_SAMPLES,
        ),
        (
            "avatars/06_text_to_image_attributes",
            "build",
            "lora-components",
            "avatars/08_photo_encoder",
        ),
    ),
    "avatars/13_instruct_pix2pix": Rule(
        load_diffusion_base, _TINY_EDIT_UNET, ("avatars/06_text_to_image_attributes", "pairs")
    ),
    "avatars/14_instruct_pix2pix_refine": Rule(
        load_diffusion_base, _TINY_EDIT_UNET, ("avatars/13_instruct_pix2pix",)
    ),
    "avatars/15_pair_instructions": Rule(
        PairToLora.from_pretrained,
        (
            *SMALL_NETWORK,
            f"--model.init_args.network.instruction_head={json.dumps(_SMALL_INSTRUCTION_HEAD)}",
            _FOUR_SAMPLES,
        ),
        ("avatars/14_instruct_pix2pix_refine", "avatars/08_photo_encoder"),
        (
            "model.network.hypernetwork.",
            "model.network.text_substitution.",
            "model.network.instruction_head.text_",
        ),
    ),
    "avatars/16_pair_hypernetwork": Rule(
        PairToLora.from_pretrained,
        (_TWO_SAMPLES,),
        ("avatars/15_pair_instructions",),
        ("model.network.text_substitution.", "model.network.instruction_head."),
    ),
    "avatars/17_vae_decoder": Rule(
        AutoencoderKL.from_pretrained,
        (_FOUR_SAMPLES,),
        ("avatars/06_text_to_image_attributes", "pairs"),
        ("vae.encoder.", "vae.quant_conv."),
    ),
    "avatars/ablations/hyperdreambooth_paper": Rule(
        ImageToLora.from_pretrained,
        (*SMALL_HYPERNETWORK, _TWO_SAMPLES),
        ("avatars/06_text_to_image_attributes", "avatars/08_photo_encoder", "lidb-targets"),
    ),
    "avatars/ablations/difflora_autoencoder": Rule(
        LoraCodec.from_pretrained,
        (
            "--model.init_args.autoencoder={directions_per_factor: 4, latent_width: 4, width: 8}",
            _TWO_SAMPLES,
        ),
        ("avatars/06_text_to_image_attributes", "teachers"),
    ),
    "avatars/ablations/difflora": Rule(
        LoraDiffusion.from_pretrained,
        (
            "--model.init_args.encoder=runs/avatars/08_photo_encoder/classifier",
            f"--model.init_args.face_pack={pretrained.FACE_PACK_DIR}",
            "--model.init_args.mixture={mode: gate, width: 16, num_tokens: 4}",
            "--model.init_args.denoiser={width: 16, depth: 1, num_heads: 2}",
            _TWO_SAMPLES,
        ),
        ("avatars/ablations/difflora_autoencoder", "avatars/08_photo_encoder"),
    ),
    "instruct_pix2pix/pretrain": _make_pair_rule(*SMALL_NETWORK),
    "instruct_pix2pix/finetune": _make_pair_rule(
        "--data.init_args.folder=pairs/magic-brush", needs=("instruct_pix2pix/pretrain",)
    ),
    "sd15/lora_autoencoder": _make_lora_autoencoder_rule("sd15"),
    "sd15/lora_diffusion": _make_lora_diffusion_rule("sd15"),
    "sdxl/lora_autoencoder": _make_lora_autoencoder_rule("sdxl"),
    "sdxl/lora_diffusion": _make_lora_diffusion_rule("sdxl"),
    "z_image/lora_autoencoder": _make_lora_autoencoder_rule("z_image"),
    "z_image/lora_diffusion": _make_lora_diffusion_rule("z_image"),
    "sd15/hypernetwork": _make_photo_rule("sd15"),
    "sd15/hyperdreambooth_paper": _make_photo_rule("sd15"),
    "sdxl/hypernetwork": _make_photo_rule("sdxl"),
    "sd3/hypernetwork": _make_photo_rule("stable_diffusion_3", _TINY_RESOLUTION),
    "flux2/klein_hypernetwork": _make_photo_rule("flux2_klein", _TINY_RESOLUTION),
    "flux2/dev_hypernetwork": _make_photo_rule("flux2", _TINY_RESOLUTION),
    "z_image/hypernetwork": _make_photo_rule("z_image", _TINY_RESOLUTION),
    "qwen_image/hypernetwork": _make_photo_rule("qwen_image", _TINY_RESOLUTION),
    "qwen_image/edit_pair_hypernetwork": _make_pair_rule(
        *SMALL_NETWORK, _TINY_RESOLUTION, base="qwen_image_edit_plus"
    ),
}


def make_command(name: str) -> list[str]:
    """The arguments of ``train`` that run four steps of a configuration."""
    return ["fit", f"--config={CONFIGS / name}.yaml", *FOUR_STEPS, *RULES[name].arguments]


def get_run_dir(name: str) -> Path:
    return Path("runs") / read_config(name)["run_name"]
