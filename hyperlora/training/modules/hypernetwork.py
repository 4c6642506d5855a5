"""Train a hypernetwork through the frozen base with one LoRA per sample."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from torch import Tensor

from hyperlora.diffusion.diffusion_base import denoiser_encoder, load_base
from hyperlora.diffusion.lora_injection import injected
from hyperlora.diffusion.losses import denoising_loss
from hyperlora.diffusion.target_modules import layout_of
from hyperlora.encoders.attribute_classifier import photo_encoder
from hyperlora.features import ImageFeatures
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.pipelines.image_to_lora import Encoder, ImageToLora
from hyperlora.training.auxiliary_losses import Misreading
from hyperlora.training.optimizers import adamw_one_cycle


class HypernetworkTraining(L.LightningModule):
    """L = ‖denoising‖² + ``weight_loss`` ‖θ̂ - θ‖² + ``output_l2`` ‖θ̂‖²     (2307.06949, eq. 3; 2506.06105 for the last)

    Batches: ``photos`` [batch, views, 3, h, w] in [0, 1] (or ``tokens`` [batch, views, tokens, width], what the encoder
    says about them), ``captions`` and ``latents`` [targets * batch, c, h, w] (or ``images`` in [0, 1], encoded here),
    target j of subject i at j * batch + i, ``subject`` [batch]. ``encoder`` is ``denoiser`` (the base itself), a
    released reader's folder, or a timm id, with ``encoder_options``; it is frozen. ``targets`` is a file of codes
    fitted beforehand (``python -m data_builder codes``) to the first so many subjects, for the weight loss. ``reader``
    and ``reading_weight`` are ``BaseModel``'s; all that a target shows is known, by its prompt or by the photos.
    ``start_from`` is the folder of a released ``ImageToLora`` whose hypernetwork training goes on from. Every
    validation logs the denoising loss of unseen subjects without LoRA, with their own photo's and with another's:
    own < base < shuffled is the sign of learning.
    """

    def __init__(
        self,
        base: str,
        encoder: str,
        out: str,
        preset: str = "attention",
        rank: int = 4,
        hypernetwork: dict[str, Any] | None = None,
        encoder_options: dict[str, Any] | None = None,
        base_options: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        targets: str | None = None,
        weight_loss: float = 0.0,
        output_l2: float = 1e-3,
        reader: str | None = None,
        reading_weight: float = 0.0,
        start_from: str | None = None,
        max_views: int = 8,
        lr: float = 3e-4,
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        # a plain attribute in a tuple: the frozen base is no part of the checkpoint
        self._base = (load_base(base, **(base_options or {})),)
        layout = layout_of({self.denoiser_name: self.base.denoiser}, preset, rank, self.base.id)
        if encoder == "denoiser":
            vision: Encoder = denoiser_encoder(self.base, **(encoder_options or {}))
        else:
            vision = photo_encoder(encoder, encoder_options)
        if start_from is None:
            network = Hypernetwork(layout, vision.width, **(hypernetwork or {}))
        else:
            network = ImageToLora.from_pretrained(start_from, base=self.base).hypernetwork.requires_grad_(True)
            network.layout.require(layout)
        self.model = ImageToLora(vision.requires_grad_(False), network, card)
        self.misreading = Misreading(reader, reading_weight)
        self.codes = load_file(targets)["codes"] if targets else None
        if gradient_checkpointing:
            self.base.denoiser.enable_gradient_checkpointing()

    @property
    def base(self) -> Any:
        return self._base[0]

    @property
    def denoiser_name(self) -> str:
        return next(iter(self.base.modules))

    def on_fit_start(self) -> None:
        self.base.pipeline.to(self.device)
        self.misreading.to(self.device)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        self.model.encoder.eval()
        features = self._features(batch)
        views = int(torch.randint(1, min(features.tokens.shape[1], self.hparams["max_views"]) + 1, ()))
        codes = self.model.hypernetwork.codes(ImageFeatures(features.tokens[:, :views]))
        weights = self.model.hypernetwork.expand(codes)
        with injected(self.base.denoiser, weights):
            denoising = self._denoising(batch, self.misreading.of(batch.get("labels")))
        size = weights.squared_norm()
        loss = denoising + self.hparams["output_l2"] * size
        self.log_dict({"train/loss": denoising, "train/delta": size.detach().sqrt()}, prog_bar=True)
        if self.codes is not None and self.hparams["weight_loss"] > 0:
            fitted = batch["subject"] < len(self.codes)
            target = self.codes.to(codes)[batch["subject"][fitted]]
            regression = torch.nn.functional.mse_loss(codes[fitted], target, reduction="sum") / len(codes)
            self.log("train/weights", regression)
            loss = loss + self.hparams["weight_loss"] * regression
        return loss

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        own = self.model.hypernetwork(ImageFeatures(self._features(batch).tokens[:, :1]))
        other = own[torch.arange(len(own), device=self.device).roll(1)]
        devices = [self.device] if self.device.type == "cuda" else []
        for name, weights in (("base", own * 0.0), ("own", own), ("shuffled", other)):
            with torch.random.fork_rng(devices), injected(self.base.denoiser, weights):
                torch.manual_seed(batch_index)  # the same noise for all three, and every time
                self.log(f"val/{name}", self._denoising(batch), prog_bar=True, batch_size=len(own), sync_dist=True)

    def _features(self, batch: dict[str, Any]) -> ImageFeatures:
        return ImageFeatures(batch["tokens"]) if "tokens" in batch else self.model.features(batch["photos"])

    def _denoising(self, batch: dict[str, Any], also: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        latents = batch["latents"] if "latents" in batch else self.base.encode_images(batch["images"])
        conditions = self.base.encode_prompts(batch["captions"])
        # in float32: bfloat16 would round away the little noise of early timesteps
        return denoising_loss(
            self.base.denoiser, self.base.noise_schedule, latents.float(), also=also, **conditions
        ).mean()

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.model.save_pretrained(self.hparams["out"])

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw_one_cycle(self, self.model.hypernetwork.parameters(), self.hparams["lr"])
