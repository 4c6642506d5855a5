"""Train a small text-to-image base (UNet and text encoder) over a given image autoencoder."""

from pathlib import Path
from typing import Final

import lightning as L
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
)
from diffusers import UNet2DConditionModel as UNet
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hyperlora.compute import fork_rng
from hyperlora.cpu import select_sdpa_kernel
from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.losses import AuxLoss, compute_denoising_loss
from hyperlora.training.auxiliary_losses import AttributeLoss
from hyperlora.training.batches import CaptionedLatentBatch
from hyperlora.training.modules.options import Options
from hyperlora.training.optimizers import make_adamw_cosine
from hyperlora.training.weight_surgery import widen_unet

NOISE_SCHEDULE: Final = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
"""Stable Diffusion's schedule with zero terminal SNR, as arguments of a diffusers scheduler."""


class TextToImageTraining(L.LightningModule):
    """Train a UNet and a CLIP text encoder on v-prediction with zero terminal SNR (2305.08891).

    Zero terminal SNR lets plain backgrounds be generated plain. When training ends, a complete
    ``StableDiffusionPipeline`` is written in fp16.

    Args:
        vae: Folder of the ``AutoencoderKL`` of the latents.
        tokenizer: Folder of a CLIP tokenizer.
        output_dir: Folder that receives the pipeline.
        unet: Arguments of ``UNet2DConditionModel``.
        text_encoder: Arguments of ``CLIPTextConfig``; the vocabulary is the tokenizer's.
        lr: Peak learning rate of AdamW.
        timestep_shift: s of ``compute_denoising_loss``: above 1, noisier timesteps come more often.
        start_from: Folder of a pipeline whose UNet and text encoder training begins with. The new
            UNet may be wider at its first level.
        focus_box: Top, left, bottom, right in fractions of the image: the box whose latents have
            the loss weight ``focus_weight``. A face's details are few latents.
        focus_weight: Loss weight of the box relative to all other latents.
        attribute_classifier: Folder of a classifier of latents for the auxiliary loss.
        attribute_loss_weight: Weight of its cross-entropy with the labels of the batch.
    """

    def __init__(
        self,
        vae: str,
        tokenizer: str,
        output_dir: str,
        unet: Options,
        text_encoder: Options,
        lr: float = 1e-3,
        timestep_shift: float = 1.0,
        start_from: str | None = None,
        focus_box: tuple[float, float, float, float] | None = None,
        focus_weight: float = 1.0,
        attribute_classifier: str | None = None,
        attribute_loss_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tokenizer = CLIPTokenizer.from_pretrained(tokenizer)
        config = CLIPTextConfig(
            vocab_size=len(self.tokenizer),
            max_position_embeddings=self.tokenizer.model_max_length,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            **text_encoder,
        )
        self.text_encoder = CLIPTextModel(config)
        self.unet = UNet(cross_attention_dim=config.hidden_size, **unet)
        if start_from is not None:
            pretrained = StableDiffusionPipeline.from_pretrained(start_from)
            widen_unet(pretrained.unet.float(), self.unet)
            self.text_encoder.load_state_dict(pretrained.text_encoder.float().state_dict())
        self.scheduler = DDPMScheduler(**NOISE_SCHEDULE)
        self.attribute_loss = AttributeLoss(attribute_classifier, attribute_loss_weight)

    def on_fit_start(self) -> None:
        """Move the attribute classifier, which is no submodule, to the device of the training."""
        self.attribute_loss.to(self.device)

    def training_step(self, batch: CaptionedLatentBatch, batch_idx: int) -> Tensor:
        """Compute the denoising loss, with the attribute loss where there is one.

        Args:
            batch: Latents with captions.
            batch_idx: Not used.

        Returns:
            Loss, a scalar.
        """
        loss = self._compute_loss(batch, self.attribute_loss.make_aux_loss(batch.labels))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: CaptionedLatentBatch, batch_idx: int) -> None:
        """Log the denoising loss with the same noise in every validation.

        Args:
            batch: Latents with captions.
            batch_idx: Seed of the noise.
        """
        with fork_rng(self.device):
            torch.manual_seed(batch_idx)
            loss = self._compute_loss(batch)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch.captions), sync_dist=True)

    def _compute_loss(self, batch: CaptionedLatentBatch, aux_loss: AuxLoss | None = None) -> Tensor:
        input_ids = self.tokenizer(
            batch.captions,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids.to(self.device)  # [n, tokens]
        prompt_embeds = self.text_encoder(input_ids)[0]  # [n, tokens, width]
        return compute_denoising_loss(
            self._predict,
            self.scheduler,
            batch.latents,
            {"prompt_embeds": prompt_embeds},
            shift=self.hparams["timestep_shift"],
            weight=self._make_focus_weights(batch.latents),
            aux_loss=aux_loss,
        ).mean()

    def _predict(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Run the UNet in training."""
        prompt_embeds = conditions["prompt_embeds"]  # [n, tokens, width]
        with select_sdpa_kernel(latents, latents[0, 0].numel()):
            output: Tensor = self.unet(latents, timesteps, prompt_embeds, return_dict=False)[0]
        return output

    def _make_focus_weights(self, latents: Tensor) -> Tensor | None:
        """Make loss weights [h, w] with a mean of 1, larger in the focus box."""
        if self.hparams["focus_box"] is None:
            return None
        h, w = latents.shape[-2:]
        top, left, bottom, right = (
            round(fraction * size)
            for fraction, size in zip(self.hparams["focus_box"], (h, w, h, w), strict=True)
        )
        weights = latents.new_ones(h, w)
        weights[top:bottom, left:right] = self.hparams["focus_weight"]
        return weights / weights.mean()

    def on_train_end(self) -> None:
        """Write the pipeline in fp16."""
        if not self.trainer.is_global_zero:
            return
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(self.hparams["vae"]),
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=DPMSolverMultistepScheduler(**NOISE_SCHEDULE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        output_dir = Path(self.hparams["output_dir"])
        pipeline.to(torch.float16).save_pretrained(output_dir, max_shard_size="16MB")
        # without a dtype argument diffusers loads its models as float32, transformers as the config
        # says: both must match
        text_encoder_config = CLIPTextConfig.from_pretrained(output_dir / "text_encoder")
        text_encoder_config.dtype = torch.float32
        text_encoder_config.save_pretrained(output_dir / "text_encoder")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make AdamW with one cosine cycle."""
        return make_adamw_cosine(self, self.parameters(), self.hparams["lr"])
