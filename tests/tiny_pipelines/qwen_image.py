"""Tiny pipelines of Qwen-Image, Qwen-Image-Edit and Qwen-Image-Edit-2511."""

from typing import Any

import torch
from torch import Tensor

from tests.tiny_pipelines.base import PROMPTS, SIDE, TinyPipeline, make_pil_image, to_tensor
from tests.tiny_pipelines.text import (
    WIDTH,
    make_qwen2_5_vl_encoder,
    make_qwen2_5_vl_processor,
    make_qwen_tokenizer,
)

HEIGHT, WIDTH_IN_PIXELS = SIDE, 3 * SIDE
"""Not square: swapped axes would show."""
INPUT_SIZE = (1152, 896)
"""Width and height of input images: of all sizes of about 1024² pixels, the VAE gets this one."""
NEGATIVE = {"negative_prompt": ["blurry"] * len(PROMPTS)}


def _make_components(**options: Any) -> dict[str, Any]:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageTransformer2DModel,
    )

    torch.manual_seed(15)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        **options,
    )
    vae = AutoencoderKLQwenImage(  # divides sides by 16, so that input images are few tokens
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=0,
        temperal_downsample=[False, True, True, False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[2.0, 0.5, 1.5, 3.0],
    )
    tokenizer = make_qwen_tokenizer()
    return {
        "transformer": transformer,
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "tokenizer": tokenizer,
        "text_encoder": make_qwen2_5_vl_encoder(tokenizer),
    }


def _make_tiny_pipeline(pipe: Any, **options: Any) -> TinyPipeline:
    def unpack(tokens: Tensor) -> Tensor:
        latents = pipe._unpack_latents(tokens, HEIGHT, WIDTH_IN_PIXELS, pipe.vae_scale_factor)
        return latents.squeeze(2)

    size = {"height": HEIGHT, "width": WIDTH_IN_PIXELS}
    arguments = size | {"true_cfg_scale": 1.0} | options.pop("arguments", {})
    return TinyPipeline(
        pipe, arguments, unpack, guidance=NEGATIVE | {"true_cfg_scale": 3.0}, **options
    )


def make_qwen_image() -> TinyPipeline:
    from diffusers import QwenImagePipeline

    return _make_tiny_pipeline(QwenImagePipeline(**_make_components()))


def make_qwen_image_edit() -> TinyPipeline:
    from diffusers import QwenImageEditPipeline

    components = _make_components()
    processor = make_qwen2_5_vl_processor(components["tokenizer"])
    pipe = QwenImageEditPipeline(processor=processor, **components)
    images = [make_pil_image(*INPUT_SIZE, seed=seed) for seed in range(len(PROMPTS))]
    return _make_tiny_pipeline(pipe, arguments={"image": images}, images=to_tensor(*images))


def make_qwen_image_edit_plus() -> TinyPipeline:
    from dataclasses import replace

    from diffusers import QwenImageEditPlusPipeline

    components = _make_components(zero_cond_t=True)  # as 2511
    processor = make_qwen2_5_vl_processor(components["tokenizer"])
    pipe = QwenImageEditPlusPipeline(processor=processor, **components)
    image = make_pil_image(*INPUT_SIZE)
    tiny = _make_tiny_pipeline(pipe, arguments={"image": image}, images=to_tensor(image))
    # the pipeline takes one prompt
    guidance = {"negative_prompt": "blurry", "true_cfg_scale": 3.0}
    return replace(tiny, prompts=tuple(PROMPTS[:1]), guidance=guidance)
