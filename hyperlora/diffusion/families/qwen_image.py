"""Qwen-Image (2508.02324): text-to-image, Edit, and Edit-2509 with its successors."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from hyperlora.data.images import to_image
from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.families.base import (
    DenoiserInputs,
    PipelineFamily,
    Window,
    broadcast_timesteps,
)
from hyperlora.diffusion.families.frame_vae import decode_frames, encode_frames
from hyperlora.diffusion.families.packing import pack_patches, unpack_patches
from hyperlora.errors import InvalidArgumentError


class QwenImageFamily(PipelineFamily):
    """Adapter of Qwen-Image: 2x2 patches as tokens, Qwen2.5-VL, a VAE of videos.

    Guidance calls the transformer once for each branch, so that a call has one branch. The
    pipeline then rescales each guided token to the norm of the conditional one.
    """

    modelspec_name: ClassVar[str] = "Qwen-Image"
    denoiser_class_name = "QwenImageTransformer2DModel"
    listed_inputs = frozenset({"img_shapes"})
    size_multiple = 2
    attention_pattern = r"(^|\.)attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$"
    feed_forward_pattern = r"(^|\.)(img|txt)_mlp\.net\.(0\.proj|2)$"
    max_prompt_tokens: ClassVar[int] = 512
    """Tokens of a prompt that the pipeline keeps; its ``encode_prompt`` alone keeps 1024."""

    @override
    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> Conditions:
        """Encode n prompts with Qwen2.5-VL, padded to the longest; ``images`` are not used."""
        prompt_embeds, mask = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.max_prompt_tokens
        )
        if mask is None:  # nothing is padded
            mask = prompt_embeds.new_ones(prompt_embeds.shape[:2])
        return {"prompt_embeds": prompt_embeds, "prompt_embeds_mask": mask.bool()}

    @torch.no_grad()
    @override
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images [n, 3, h, w] in [0, 1] to scaled latents, the means of the posterior."""
        return encode_frames(self.pipeline.vae, (images * 2 - 1).to(self.device))

    @override
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to images [n, 3, h, w] in [0, 1], differentiably."""
        return (decode_frames(self.pipeline.vae, latents) / 2 + 0.5).clamp(0, 1)

    @override
    def make_guidance_arguments(
        self, guidance_scale: float, negative_prompts: list[str]
    ) -> dict[str, Any]:
        """Make scale and prompts of guidance by two calls for each step."""
        return {"true_cfg_scale": guidance_scale, "negative_prompt": negative_prompts}

    @override
    def make_inputs(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        guidance_scale: float | None = None,
    ) -> DenoiserInputs:
        """Make the arguments of the transformer; see ``PipelineFamily.make_inputs``."""
        mask = conditions["prompt_embeds_mask"]
        return {
            "hidden_states": pack_patches(latents),  # [n, h/2 w/2, 4 c]
            "timestep": broadcast_timesteps(timesteps, latents) / 1000,  # σ
            "encoder_hidden_states": conditions["prompt_embeds"],  # [n, tokens, width]
            # no mask where nothing is padded: attention is then faster
            "encoder_hidden_states_mask": None if mask.all() else mask.long(),
            "img_shapes": [[_get_grid(latents)]] * len(latents),  # (frames, rows, columns)
        }

    @override
    def get_grid(self, inputs: DenoiserInputs) -> tuple[int, int]:
        """Return rows and columns of the noisy latents' tokens."""
        _, rows, columns = inputs["img_shapes"][0][0]
        return rows, columns

    @override
    def crop_inputs(self, inputs: DenoiserInputs, window: Window) -> DenoiserInputs:
        """Restrict a call to the tokens of a rectangle, as an image of its own."""
        top, left, height, width = window
        rows, columns = self.get_grid(inputs)
        tokens = inputs["hidden_states"]
        image, others = tokens[:, : rows * columns], tokens[:, rows * columns :]
        grid = image.unflatten(1, (rows, columns))  # [n, h/2, w/2, 4 c]
        window_tokens = grid[:, top : top + height, left : left + width].flatten(1, 2)
        img_shapes = [[(1, height, width), *shapes[1:]] for shapes in inputs["img_shapes"]]
        hidden_states = torch.cat([window_tokens, others], 1)
        return {**inputs, "hidden_states": hidden_states, "img_shapes": img_shapes}

    @override
    def read_output(self, output: Any, latents: Tensor) -> Tensor:
        """Unpack the tokens of the noisy latents, which come first, to [n, c, h, w]."""
        _, rows, columns = _get_grid(latents)
        return unpack_patches(output[:, : rows * columns], latents.shape[-2:])


class QwenImageEditFamily(QwenImageFamily):
    """Adapter of Qwen-Image-Edit: Qwen2.5-VL sees the input image, as does the transformer.

    The latents of the input image follow the noisy ones as further tokens, of any size. The
    pipeline resizes input images to about 1024² pixels, both for Qwen2.5-VL and for the VAE.
    ``encode_text`` does so too; ``encode_images`` takes images as they are.
    """

    modelspec_name = "Qwen-Image-Edit"
    edits_images = requires_input_image = True
    encodes_images_in_prompts = True
    edits_in_batches = False
    text_encoder_area: ClassVar[int] = 1024**2
    """Pixels of the input image for Qwen2.5-VL, whose number of tokens depends on it."""

    @override
    def make_edit_arguments(
        self, images: Tensor, guidance_scale: float, image_guidance_scale: float
    ) -> dict[str, Any]:
        """Make one input image; the edited one has its size."""
        height, width = images.shape[-2:]
        pil_images = [to_image(image) for image in images]
        guidance = self.make_guidance_arguments(guidance_scale, [""] * len(images))
        return {"image": pil_images, "height": height, "width": width, **guidance}

    @override
    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> Conditions:
        """Encode n instructions, each with its input image, padded to the longest.

        Args:
            prompts: n instructions.
            images: Their input images [n, 3, h, w] in [0, 1].

        Returns:
            The embeddings; those of an image's tokens precede those of the instruction.

        Raises:
            InvalidArgumentError: There is not one image for each instruction.
        """
        if images is None or len(images) != len(prompts):
            num_images = 0 if images is None else len(images)
            raise InvalidArgumentError(
                f"{type(self.pipeline).__name__} encodes instructions with their input images: "
                f"images must be given, one for each of {len(prompts)} instructions, "
                f"got {num_images}"
            )
        # one by one: the pipeline of Edit-2509 would show all images to each instruction
        embeds = [
            self.pipeline.encode_prompt(prompt, [image], device=self.device)[0].squeeze(0)
            for prompt, image in zip(prompts, self._resize_images(images), strict=True)
        ]  # n times [tokens, width]
        masks = [embed.new_ones(len(embed), dtype=torch.bool) for embed in embeds]
        return {
            "prompt_embeds": pad_sequence(embeds, batch_first=True),  # [n, tokens, width]
            "prompt_embeds_mask": pad_sequence(masks, batch_first=True),  # [n, tokens]
        }

    @override
    def make_inputs(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        guidance_scale: float | None = None,
    ) -> DenoiserInputs:
        """Make the arguments of the transformer; without ``image_latents`` those of Qwen-Image."""
        inputs = super().make_inputs(latents, timesteps, conditions, guidance_scale)
        if "image_latents" in conditions:
            image_latents = conditions["image_latents"].to(latents)
            image_tokens = pack_patches(image_latents)  # [n, h'/2 w'/2, 4 c]
            inputs["hidden_states"] = torch.cat([inputs["hidden_states"], image_tokens], 1)
            grids = [_get_grid(latents), _get_grid(image_latents)]
            inputs["img_shapes"] = [grids] * len(latents)
        return inputs

    def _resize_images(self, images: Tensor) -> list[Any]:
        """Resize images [n, 3, h, w] in [0, 1] to PIL images for Qwen2.5-VL, as the pipeline."""
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions

        height, width = images.shape[-2:]
        new_width, new_height, _ = calculate_dimensions(self.text_encoder_area, width / height)
        processor = self.pipeline.image_processor
        pil_images = processor.numpy_to_pil(processor.pt_to_numpy(images))
        return [processor.resize(image, new_height, new_width) for image in pil_images]


class QwenImageEditPlusFamily(QwenImageEditFamily):
    """Adapter of Qwen-Image-Edit-2509 and 2511: Qwen2.5-VL sees the input image at 384² pixels.

    The pipeline takes several input images for one instruction; the adapter takes one for each.
    """

    modelspec_name = "Qwen-Image-Edit-Plus"
    text_encoder_area = 384**2


def _get_grid(latents: Tensor) -> tuple[int, int, int]:
    """Return frames, rows and columns of the 2x2 patches of latents [n, c, h, w]."""
    height, width = latents.shape[-2:]
    return 1, height // 2, width // 2
