"""Train the base of edits: an InstructPix2Pix UNet (2211.09800) over the autoencoder and text encoder of a base."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionInstructPix2PixPipeline,
)
from diffusers import UNet2DConditionModel as UNet
from torch import Tensor

from hyperlora.diffusion.diffusion_base import PromptCache, load_diffusion_base
from hyperlora.diffusion.losses import compute_denoising_loss, compute_edit_region_weights
from hyperlora.training.auxiliary_losses import AttributeLoss, LatentPreviewLoss
from hyperlora.training.optimizers import make_muon_cosine, split_muon_params
from hyperlora.training.weight_surgery import prune_unet


class InstructPix2PixTraining(L.LightningModule):
    """A UNet that reads the picture before beside the noise, and the instruction as text.

    Batches: ``before`` and ``after`` [n, c, h, w] scaled latents, ``instructions`` n strings. ``base_dir`` is the pipeline
    whose autoencoder, text encoder and (as far as it fits) UNet are taken; ``unet`` changes its UNet's configuration.
    Places that the edit changes count up to ``edit_region_weight`` times more than the rest: an edit is few latents. With
    probability ``cond_dropout_prob`` the picture before and the instruction are left out together, for guidance.
    ``prediction_type`` is what the UNet says: of an edit nearly all of the sample is known, and saying it is copying what is
    seen, while velocity is a difference of what is seen that changes with every step. ``start_from`` is an edit base
    that training goes on from. ``attribute_classifier`` and ``attribute_loss_weight`` are ``TextToImageTraining``'s, on the picture after, which
    the picture before and the instruction tell behind any noise; ``preview_loss_weight`` counts how far its ``LatentPreviewLoss`` of
    ``preview_upscale`` is off. When training ends, ``output_dir`` holds a
    ``StableDiffusionInstructPix2PixPipeline``, fp16, without the parts it shares with ``base_dir``: these are links to it.
    """

    def __init__(
        self,
        base: str,
        output_dir: str,
        unet: dict[str, Any] | None = None,
        lr: float = 5e-4,
        timestep_shift: float = 1.0,
        edit_region_weight: float = 4.0,
        cond_dropout_prob: float = 0.05,
        prediction_type: str = "v_prediction",
        start_from: str | None = None,
        attribute_classifier: str | None = None,
        attribute_loss_weight: float = 0.0,
        preview_loss_weight: float = 0.0,
        preview_upscale: int = 2,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._base = (
            load_diffusion_base(base),
        )  # a plain attribute in a tuple: the frozen base is no part of the checkpoint
        base_config = dict(self.base.denoiser.config)
        self.unet = UNet.from_config(
            base_config | {"in_channels": 2 * base_config["in_channels"]} | (unet or {})
        )
        self.attribute_loss = AttributeLoss(attribute_classifier, attribute_loss_weight)
        self.preview_loss = (
            LatentPreviewLoss(base_config["out_channels"], preview_upscale)
            if preview_loss_weight
            else None
        )
        self.prompt_cache: PromptCache = {}
        self.noise_scheduler = DDPMScheduler.from_config(
            self.base.noise_schedule.config, prediction_type=prediction_type
        )
        if start_from is None:
            prune_unet(self.base.denoiser, self.unet)
        else:
            pretrained = load_diffusion_base(start_from)
            self.unet.load_state_dict(pretrained.denoiser.state_dict())
            if (pretrained.noise_scheduler.config.prediction_type, prediction_type) == (
                "v_prediction",
                "sample",
            ):
                for parameter in self.unet.conv_out.parameters():
                    parameter.data.neg_()  # v is minus the sample where all is noise

    @property
    def base(self) -> Any:
        return self._base[0]

    def on_fit_start(self) -> None:
        self.base.pipeline.to(self.device)
        self.attribute_loss.to(self.device)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        drop_mask = (
            torch.rand(len(batch["before"]), device=self.device) < self.hparams["cond_dropout_prob"]
        )
        instructions = [
            "" if drop else text
            for drop, text in zip(drop_mask.tolist(), batch["instructions"], strict=True)
        ]
        loss = self._compute_loss(
            batch | {"instructions": instructions}, drop_mask, self._make_aux_loss_fn(batch)
        )
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        no_drop = torch.zeros(len(batch["before"]), dtype=torch.bool, device=self.device)
        with torch.random.fork_rng():
            torch.manual_seed(batch_idx)  # the same noise every time
            self.log(
                "val/loss",
                self._compute_loss(batch, no_drop),
                prog_bar=True,
                batch_size=len(no_drop),
            )

    def _make_aux_loss_fn(self, batch: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
        """What else counts than the latents' error, as ``compute_denoising_loss`` takes it."""
        attribute_loss_fn, preview_loss = (
            self.attribute_loss.make_loss_fn(batch.get("labels")),
            self.preview_loss,
        )
        if preview_loss is None:
            return attribute_loss_fn
        before, after = batch["before"].float(), batch["after"].float()
        if not preview_loss.has_kernel:
            preview_loss.fit_kernel(self.base, after)
        region_weights = self.hparams["preview_loss_weight"] * compute_edit_region_weights(
            before, after, self.hparams["edit_region_weight"]
        )
        return lambda latents: (
            preview_loss.compute_error(latents, after, region_weights)
            + (attribute_loss_fn(latents) if attribute_loss_fn else 0.0)
        )

    def _compute_loss(
        self,
        batch: dict[str, Any],
        drop_mask: Tensor,
        aux_loss_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        before, after = batch["before"].float(), batch["after"].float()
        # diffusers' pipeline shows the UNet latents that are not scaled
        cond_latents = before / self.base.pipeline.vae.config.scaling_factor
        return compute_denoising_loss(
            self.unet,
            self.noise_scheduler,
            after,
            cond_latents=cond_latents * ~drop_mask[:, None, None, None],
            shift=self.hparams["timestep_shift"],
            weight=compute_edit_region_weights(before, after, self.hparams["edit_region_weight"]),
            aux_loss_fn=aux_loss_fn,
            aux_loss_weight=(~drop_mask).float(),
            **self.base.encode_prompts(batch["instructions"], self.prompt_cache),
        ).mean()

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            save_edit_pipeline(
                Path(self.hparams["output_dir"]),
                Path(self.hparams["base"]),
                self.unet,
                self.noise_scheduler,
            )

    def configure_optimizers(self) -> dict[str, Any]:
        matrices, other_params = split_muon_params(
            self.unet.named_parameters(), ("conv_in", "conv_out")
        )
        return make_muon_cosine(self, matrices, other_params, self.hparams["lr"])


def save_edit_pipeline(
    output_dir: Path, base_dir: Path, unet: UNet, noise_scheduler: DDPMScheduler | None = None
) -> None:
    """``output_dir`` as a pipeline folder; autoencoder, text encoder and tokenizer are relative links to those of ``base_dir``,
    whose ``noise_scheduler`` is kept unless given."""
    base_pipeline = load_diffusion_base(base_dir).pipeline
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=AutoencoderKL.from_pretrained(base_dir / "vae"),
        text_encoder=base_pipeline.text_encoder,
        tokenizer=base_pipeline.tokenizer,
        unet=unet.half(),
        scheduler=DPMSolverMultistepScheduler.from_config(
            noise_scheduler.config if noise_scheduler else base_pipeline.scheduler.config
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    pipeline.save_config(output_dir)
    pipeline.unet.save_pretrained(output_dir / "unet", max_shard_size="16MB")
    pipeline.scheduler.save_pretrained(output_dir / "scheduler")
    for component in ("vae", "text_encoder", "tokenizer"):
        link = output_dir / component
        link.unlink(missing_ok=True)
        link.symlink_to(
            os.path.relpath((base_dir / component).resolve(), output_dir.resolve()),
            target_is_directory=True,
        )
