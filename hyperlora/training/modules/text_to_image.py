"""Train a small text-to-image base (UNet and text encoder) over a given autoencoder, for the embedded world."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
)
from diffusers import UNet2DConditionModel as UNet
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hyperlora.diffusion.losses import compute_denoising_loss
from hyperlora.training.auxiliary_losses import AttributeLoss
from hyperlora.training.optimizers import make_adamw_cosine
from hyperlora.training.weight_surgery import widen_unet

NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}


class TextToImageTraining(L.LightningModule):
    """v-prediction with zero terminal SNR (2305.08891), so that plain backgrounds come out plain.

    Batches: ``latents`` [n, c, h, w], ``captions`` n strings (some empty, for classifier-free guidance). When training
    ends, ``output_dir`` holds a complete ``StableDiffusionPipeline``, fp16. ``start_from`` is the folder of such a pipeline
    whose UNet and text encoder training begins with; the first level of the new UNet may be wider. ``focus_box`` (top,
    left, bottom, right) is a box in fractions of the picture that counts ``focus_weight`` times as much as the rest: a
    face's small parts are few latents. ``attribute_classifier`` is the folder of a released reader of latents; what it reads in the
    clean latents that the UNet expects then counts ``attribute_loss_weight`` times its cross-entropy with the batch's
    ``labels`` ({attribute: [n]}, ``HELD_OUT_KINDS_GROUP`` for what the caption does not name).
    """

    def __init__(
        self,
        vae: str,
        tokenizer: str,
        output_dir: str,
        unet: dict[str, Any],
        text_encoder: dict[str, Any],
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
        self.attribute_loss.to(self.device)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self._compute_loss(batch, self.attribute_loss.make_loss_fn(batch.get("labels")))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(batch_idx)  # the same noise every time
            self.log(
                "val/loss",
                self._compute_loss(batch),
                prog_bar=True,
                batch_size=len(batch["captions"]),
            )

    def _compute_loss(
        self, batch: dict[str, Any], aux_loss_fn: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        input_ids = self.tokenizer(
            batch["captions"],
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids.to(self.device)
        prompt_embeds = self.text_encoder(input_ids)[0]
        return compute_denoising_loss(
            self.unet,
            self.scheduler,
            batch["latents"],
            encoder_hidden_states=prompt_embeds,
            shift=self.hparams["timestep_shift"],
            weight=self._make_focus_weights(batch["latents"]),
            aux_loss_fn=aux_loss_fn,
        ).mean()

    def _make_focus_weights(self, latents: Tensor) -> Tensor | None:
        """[h, w] with a mean of 1."""
        if self.hparams["focus_box"] is None:
            return None
        h, w = latents.shape[-2:]
        top, left, bottom, right = (
            round(x * n) for x, n in zip(self.hparams["focus_box"], (h, w, h, w), strict=True)
        )
        weights = latents.new_ones(h, w)
        weights[top:bottom, left:right] = self.hparams["focus_weight"]
        return weights / weights.mean()

    def on_train_end(self) -> None:
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
        pipeline.to(torch.float16)
        # plain from_pretrained gives diffusers parts in float32, but transformers ones as stored
        pipeline.text_encoder.float()
        pipeline.save_pretrained(Path(self.hparams["output_dir"]), max_shard_size="16MB")

    def configure_optimizers(self) -> dict[str, Any]:
        return make_adamw_cosine(self, self.parameters(), self.hparams["lr"])
