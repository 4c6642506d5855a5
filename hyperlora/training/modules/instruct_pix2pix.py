"""Train an InstructPix2Pix UNet (2211.09800) over the autoencoder and text encoder of a base."""

import os
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionInstructPix2PixPipeline,
)
from diffusers import UNet2DConditionModel as UNet
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from hyperlora.compute import fork_rng
from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.diffusion_base import PromptCache
from hyperlora.diffusion.families.instruct_pix2pix import InstructPix2PixFamily
from hyperlora.diffusion.losses import (
    AuxLoss,
    compute_denoising_loss,
    compute_edit_region_weights,
)
from hyperlora.diffusion.shared_components import SHARED_COMPONENTS_KEY
from hyperlora.training.auxiliary_losses import AttributeLoss, LatentPreviewLoss
from hyperlora.training.batches import EditBatch
from hyperlora.training.modules.frozen_base import FrozenBaseTraining, load_training_base
from hyperlora.training.modules.options import Options
from hyperlora.training.optimizers import make_muon_cosine, split_muon_params
from hyperlora.training.weight_surgery import prune_unet

_SHARED_COMPONENTS = ("vae", "text_encoder", "tokenizer")


class InstructPix2PixTraining(FrozenBaseTraining):
    """Train a UNet that takes the image before the edit as further channels, and an instruction.

    When training ends, a ``StableDiffusionInstructPix2PixPipeline`` is written in fp16. The
    components that it shares with the base are links to it.

    Args:
        base: Folder of the pipeline whose autoencoder, text encoder and (pruned) UNet are used.
        output_dir: Folder that receives the pipeline.
        unet: Changes of the base's UNet configuration: a narrower deepest level.
        lr: Peak learning rate of Muon.
        timestep_shift: s of ``compute_denoising_loss``: above 1, noisier timesteps come more often.
        edit_region_weight: Loss weight that is added where the edit changes the latents, since an
            edit is few latents.
        cond_dropout_prob: Probability of dropping image and instruction together, for guidance.
        prediction_type: ``v_prediction`` or ``sample``. An edit keeps nearly all of its input, so
            predicting the sample is mostly copying.
        start_from: Folder of an edit pipeline to continue from, instead of the pruned base.
        attribute_classifier: Folder of a classifier of latents for the auxiliary loss. It has its
            full weight at every noise level: the input image and the instruction determine the
            result even where there is only noise.
        attribute_loss_weight: Weight of its cross-entropy with the labels after the edit.
        preview_loss_weight: Weight of ``LatentPreviewLoss``; 0 for none.
        preview_upscale: Its image pixels per latent pixel, along each axis.
    """

    def __init__(
        self,
        base: str,
        output_dir: str,
        unet: Options | None = None,
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
        self.base = load_training_base(base)
        base_unet: UNet = self.base.denoiser
        base_config = dict(base_unet.config)
        # noisy latents and, as further channels, those of the image before the edit
        in_channels = 2 * base_config["in_channels"]
        self.unet = UNet.from_config(base_config | {"in_channels": in_channels} | (unet or {}))
        self.edit_family = InstructPix2PixFamily(self.base.pipeline)
        self.attribute_loss = AttributeLoss(attribute_classifier, attribute_loss_weight)
        self.preview_loss = (
            LatentPreviewLoss(base_config["out_channels"], preview_upscale)
            if preview_loss_weight
            else None
        )
        self.prompt_cache: PromptCache = {}
        self.noise_scheduler = DDPMScheduler.from_config(
            self.base.noise_scheduler.config, prediction_type=prediction_type
        )
        if start_from is None:
            prune_unet(base_unet, self.unet)
        else:
            self._load_unet(start_from, prediction_type)

    def _load_unet(self, start_from: str, prediction_type: str) -> None:
        pretrained = load_training_base(start_from)
        self.unet.load_state_dict(pretrained.denoiser.state_dict())
        old_prediction_type = pretrained.noise_scheduler.config.prediction_type
        if (old_prediction_type, prediction_type) == ("v_prediction", "sample"):
            # v = α ε - σ x₀ is -x₀ where all is noise (α = 0, σ = 1): the nearest start
            for parameter in self.unet.conv_out.parameters():
                parameter.data.neg_()

    def training_step(self, batch: EditBatch, batch_idx: int) -> Tensor:
        """Compute the denoising loss with random condition dropout.

        Args:
            batch: Latents before and after an edit with its instruction.
            batch_idx: Not used.

        Returns:
            Loss, a scalar.
        """
        drop_mask = (
            torch.rand(len(batch.before), device=self.device) < self.hparams["cond_dropout_prob"]
        )  # [n]
        instructions = [
            "" if drop else instruction
            for drop, instruction in zip(drop_mask.tolist(), batch.instructions, strict=True)
        ]
        aux_loss = self._make_aux_loss(batch, (~drop_mask).float())
        loss = self._compute_loss(replace(batch, instructions=instructions), drop_mask, aux_loss)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Log the denoising loss with the same noise in every validation.

        Args:
            batch: Latents before and after an edit with its instruction.
            batch_idx: Seed of the noise.
        """
        no_drop = torch.zeros(len(batch.before), dtype=torch.bool, device=self.device)
        with fork_rng(self.device):
            torch.manual_seed(batch_idx)
            loss = self._compute_loss(batch, no_drop)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(no_drop), sync_dist=True)

    def _make_aux_loss(self, batch: EditBatch, sample_weights: Tensor) -> AuxLoss | None:
        """Make the sum of attribute loss and preview loss, weighted per sample [n]."""
        attribute_loss = self.attribute_loss.make_aux_loss(batch.labels, weight=sample_weights)
        preview_loss = self.preview_loss
        if preview_loss is None:
            return attribute_loss
        before, after = batch.before.float(), batch.after.float()
        if not preview_loss.has_kernel:
            preview_loss.fit_kernel(self.base, after)
        region_weights = self.hparams["preview_loss_weight"] * compute_edit_region_weights(
            before, after, self.hparams["edit_region_weight"]
        )  # [n, 1, h, w]

        def compute_sum(latents: Tensor) -> Tensor:
            """Compute the sum of both losses of predicted latents, per sample [n]."""
            loss = preview_loss.compute_error(latents, after, region_weights)  # [n]
            return loss + (attribute_loss.fn(latents) if attribute_loss else 0.0)

        return AuxLoss(compute_sum, sample_weights)

    def _compute_loss(
        self, batch: EditBatch, drop_mask: Tensor, aux_loss: AuxLoss | None = None
    ) -> Tensor:
        """Compute the loss; the image before the edit is dropped where ``drop_mask`` [n] is set."""
        before, after = batch.before.float(), batch.after.float()  # [n, c, h, w]
        conditions: Conditions = {
            **self.base.encode_prompts(batch.instructions, self.prompt_cache),
            "image_latents": before * ~drop_mask[:, None, None, None],
        }
        return compute_denoising_loss(
            self._predict,
            self.noise_scheduler,
            after,
            conditions,
            shift=self.hparams["timestep_shift"],
            weight=compute_edit_region_weights(before, after, self.hparams["edit_region_weight"]),
            aux_loss=aux_loss,
        ).mean()

    def _predict(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Run the UNet in training as the pipeline that it becomes will."""
        return self.edit_family.predict(latents, timesteps, conditions, denoiser=self.unet)

    def on_train_end(self) -> None:
        """Write the pipeline."""
        if self.trainer.is_global_zero:
            save_edit_pipeline(
                Path(self.hparams["output_dir"]),
                Path(self.hparams["base"]),
                self.unet,
                self.noise_scheduler,
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make Muon for the hidden matrices and AdamW for all else, with one cosine cycle."""
        matrices, other_params = split_muon_params(
            self.unet.named_parameters(), ("conv_in", "conv_out")
        )
        return make_muon_cosine(self, matrices, other_params, self.hparams["lr"])


def save_edit_pipeline(
    output_dir: Path, base_dir: Path, unet: UNet, noise_scheduler: DDPMScheduler | None = None
) -> None:
    """Write an InstructPix2Pix pipeline whose other components are links to a base.

    Args:
        output_dir: Folder to write.
        base_dir: Pipeline whose autoencoder, text encoder and tokenizer get relative links.
        unet: The UNet, which is converted to fp16 in place.
        noise_scheduler: Schedule and prediction type; None for those of the base.
    """
    base_pipeline = load_training_base(base_dir).pipeline
    scheduler_config = noise_scheduler.config if noise_scheduler else base_pipeline.scheduler.config
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=AutoencoderKL.from_pretrained(base_dir / "vae"),
        text_encoder=base_pipeline.text_encoder,
        tokenizer=base_pipeline.tokenizer,
        unet=unet.half(),
        scheduler=DPMSolverMultistepScheduler.from_config(scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    relative_base_dir = Path(os.path.relpath(base_dir.resolve(), output_dir.resolve()))
    shared_components = dict.fromkeys(_SHARED_COMPONENTS, relative_base_dir.as_posix())
    pipeline.register_to_config(**{SHARED_COMPONENTS_KEY: shared_components})
    pipeline.save_config(output_dir)
    pipeline.unet.save_pretrained(output_dir / "unet", max_shard_size="16MB")
    pipeline.scheduler.save_pretrained(output_dir / "scheduler")
    for component in _SHARED_COMPONENTS:
        link = output_dir / component
        link.unlink(missing_ok=True)
        link.symlink_to(relative_base_dir / component, target_is_directory=True)
