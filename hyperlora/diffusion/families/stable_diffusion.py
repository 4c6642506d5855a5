"""Stable Diffusion 1 and 2 (2112.10752), and what every UNet family has in common."""

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.families.base import (
    DenoiserInputs,
    PipelineFamily,
)
from hyperlora.lora.io.architectures import CUSTOM_UNET


class StableDiffusionFamily(PipelineFamily):
    """Adapter of Stable Diffusion 1 and 2: a UNet, CLIP, two branches of guidance in one batch."""

    modelspec_name: ClassVar[str] = "stable-diffusion-v1"
    denoiser_class_name = "UNet2DConditionModel"
    denoiser_name = "unet"
    adaptable_text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    schedulers = (
        "DDIM",
        "DDIMTrailing",
        "DDPM",
        "DEISMultistep",
        "DPMSolverMultistep",
        "DPMSolverMultistepKarras",
        "DPMSolverMultistepSDE",
        "DPMSolverMultistepSDEKarras",
        "DPMSolverSinglestep",
        "EulerAncestralDiscrete",
        "EulerDiscrete",
        "EulerDiscreteTrailing",
        "HeunDiscrete",
        "KDPM2AncestralDiscrete",
        "KDPM2Discrete",
        "LCM",
        "LMSDiscrete",
        "PNDM",
        "TCD",
        "UniPCMultistep",
    )
    default_guidance_scale = 3.0  # LoRAs of a subject oversaturate at the 7.5 of the base alone
    default_num_inference_steps = 20
    batches_branches = True
    negative_branches: ClassVar[tuple[bool, ...]] = (True, False)
    latents_input = "sample"
    size_multiple = 1
    attention_pattern = r"(^|\.)attn\d\.(to_[qkv]|to_out\.0)$"
    feed_forward_pattern = r"(^|\.)ff\.net\.(0\.proj|2)$|\.time_emb_proj$"
    convolution_pattern = r"\.(conv1|conv2|conv_shortcut|conv|proj_in|proj_out)$"

    @property
    @override
    def architecture(self) -> str:
        """Architecture name in modelspec metadata: by text width version 1, 2 or none of both."""
        if self.denoiser is None:  # loaded to encode images and prompts alone
            return self.modelspec_name
        match self.denoiser.config.cross_attention_dim:
            case 768:
                return self.modelspec_name
            case 1024:
                predicts_v = self.pipeline.scheduler.config.prediction_type == "v_prediction"
                return f"stable-diffusion-v2-{'768-v' if predicts_v else '512'}"
            case _:
                return CUSTOM_UNET

    @property
    @override
    def resolution(self) -> int:
        """Side in pixels of the square images that the UNet was trained on."""
        return int(self.denoiser.config.sample_size * self.pipeline.vae_scale_factor)

    @override
    def encode_text(self, prompts: list[str], images: Tensor | None = None) -> Conditions:
        """Encode n prompts with CLIP."""
        return {"prompt_embeds": self.pipeline.encode_prompt(prompts, self.device, 1, False)[0]}

    @override
    def make_inputs(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        guidance_scale: float | None = None,
    ) -> DenoiserInputs:
        """Make the arguments of the UNet; see ``PipelineFamily.make_inputs``."""
        return {
            "sample": latents,
            "timestep": timesteps.to(latents.device).expand(len(latents)),
            "encoder_hidden_states": conditions["prompt_embeds"],
        }
