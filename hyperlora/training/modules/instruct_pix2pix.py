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

from hyperlora.diffusion.diffusion_base import Texts, load_base
from hyperlora.diffusion.losses import denoising_loss, edit_weight
from hyperlora.training.auxiliary_losses import Misreading, Preview
from hyperlora.training.optimizers import hidden_matrices, muon_one_cycle
from hyperlora.training.weight_surgery import prune


class EditBaseModel(L.LightningModule):
    """A UNet that reads the picture before beside the noise, and the instruction as text.

    Batches: ``before`` and ``after`` [n, c, h, w] scaled latents, ``instructions`` n strings. ``base`` is the pipeline
    whose autoencoder, text encoder and (as far as it fits) UNet are taken; ``unet`` changes its UNet's configuration.
    Places that the edit changes count up to ``change_weight`` times more than the rest: an edit is few latents. With
    probability ``unconditional`` the picture before and the instruction are left out together, for guidance.
    ``prediction`` is what the UNet says: of an edit nearly all of the sample is known, and saying it is copying what is
    seen, while velocity is a difference of what is seen that changes with every step. ``start_from`` is an edit base
    that training goes on from. ``reader`` and ``reading_weight`` are ``BaseModel``'s, on the picture after, which
    the picture before and the instruction tell behind any noise; ``preview_weight`` counts how far its ``Preview`` of
    ``preview_detail`` is off. When training ends, ``out`` holds a
    ``StableDiffusionInstructPix2PixPipeline``, fp16, without the parts it shares with ``base``: these are links to it.
    """

    def __init__(
        self,
        base: str,
        out: str,
        unet: dict[str, Any] | None = None,
        lr: float = 5e-4,
        timestep_shift: float = 1.0,
        change_weight: float = 4.0,
        unconditional: float = 0.05,
        prediction: str = "v_prediction",
        start_from: str | None = None,
        reader: str | None = None,
        reading_weight: float = 0.0,
        preview_weight: float = 0.0,
        preview_detail: int = 2,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._base = (load_base(base),)  # a plain attribute in a tuple: the frozen base is no part of the checkpoint
        whole = dict(self.base.denoiser.config)
        self.unet = UNet.from_config(whole | {"in_channels": 2 * whole["in_channels"]} | (unet or {}))
        self.misreading = Misreading(reader, reading_weight)
        self.preview = Preview(whole["out_channels"], preview_detail) if preview_weight else None
        self.texts: Texts = {}
        self.schedule = DDPMScheduler.from_config(self.base.noise_schedule.config, prediction_type=prediction)
        if start_from is None:
            prune(self.base.denoiser, self.unet)
        else:
            before = load_base(start_from)
            self.unet.load_state_dict(before.denoiser.state_dict())
            if (before.noise_schedule.config.prediction_type, prediction) == ("v_prediction", "sample"):
                for parameter in self.unet.conv_out.parameters():
                    parameter.data.neg_()  # v is minus the sample where all is noise

    @property
    def base(self) -> Any:
        return self._base[0]

    def on_fit_start(self) -> None:
        self.base.pipeline.to(self.device)
        self.misreading.to(self.device)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        dropped = torch.rand(len(batch["before"]), device=self.device) < self.hparams["unconditional"]
        words = ["" if drop else text for drop, text in zip(dropped.tolist(), batch["instructions"], strict=True)]
        loss = self._loss(batch | {"instructions": words}, dropped, self._further(batch))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        none = torch.zeros(len(batch["before"]), dtype=torch.bool, device=self.device)
        with torch.random.fork_rng():
            torch.manual_seed(batch_index)  # the same noise every time
            self.log("val/loss", self._loss(batch, none), prog_bar=True, batch_size=len(none))

    def _further(self, batch: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
        """What else counts than the latents' error, as ``denoising_loss`` takes it."""
        misread, preview = self.misreading.of(batch.get("labels")), self.preview
        if preview is None:
            return misread
        before, after = batch["before"].float(), batch["after"].float()
        if not preview.fitted:
            preview.fit(self.base, after)
        where = self.hparams["preview_weight"] * edit_weight(before, after, self.hparams["change_weight"])
        return lambda latents: preview.error(latents, after, where) + (misread(latents) if misread else 0.0)

    def _loss(self, batch: dict[str, Any], dropped: Tensor, also: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        before, after = batch["before"].float(), batch["after"].float()
        # diffusers' pipeline shows the UNet latents that are not scaled
        seen = before / self.base.pipeline.vae.config.scaling_factor
        return denoising_loss(
            self.unet,
            self.schedule,
            after,
            beside=seen * ~dropped[:, None, None, None],
            shift=self.hparams["timestep_shift"],
            weight=edit_weight(before, after, self.hparams["change_weight"]),
            also=also,
            sure=(~dropped).float(),
            **self.base.encode_prompts(batch["instructions"], self.texts),
        ).mean()

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            write_edit_base(Path(self.hparams["out"]), Path(self.hparams["base"]), self.unet, self.schedule)

    def configure_optimizers(self) -> dict[str, Any]:
        hidden, others = hidden_matrices(self.unet.named_parameters(), ("conv_in", "conv_out"))
        return muon_one_cycle(self, hidden, others, self.hparams["lr"])


def write_edit_base(out: Path, base: Path, unet: UNet, schedule: DDPMScheduler | None = None) -> None:
    """``out`` as a pipeline folder; autoencoder, text encoder and tokenizer are relative links to those of ``base``,
    whose ``schedule`` is kept unless given."""
    home = load_base(base).pipeline
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=AutoencoderKL.from_pretrained(base / "vae"),
        text_encoder=home.text_encoder,
        tokenizer=home.tokenizer,
        unet=unet.half(),
        scheduler=DPMSolverMultistepScheduler.from_config(schedule.config if schedule else home.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    out.mkdir(parents=True, exist_ok=True)
    pipeline.save_config(out)
    pipeline.unet.save_pretrained(out / "unet", max_shard_size="16MB")
    pipeline.scheduler.save_pretrained(out / "scheduler")
    for shared in ("vae", "text_encoder", "tokenizer"):
        link = out / shared
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath((base / shared).resolve(), out.resolve()), target_is_directory=True)
