"""Train a hypernetwork through the frozen base with one LoRA per sample."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from torch import Tensor

from hyperlora.diffusion.diffusion_base import load_diffusion_base, make_unet_encoder
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.diffusion.losses import compute_denoising_loss
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.encoders.attribute_classifier import load_image_encoder
from hyperlora.features import ImageFeatures
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.pipelines.image_to_lora import Encoder, ImageToLora
from hyperlora.training.auxiliary_losses import AttributeLoss
from hyperlora.training.optimizers import make_adamw_cosine


class HypernetworkTraining(L.LightningModule):
    """L = ‖denoising‖² + ``code_loss_weight`` ‖θ̂ - θ‖² + ``delta_l2_weight`` ‖θ̂‖²     (2307.06949, eq. 3; 2506.06105 for the last)

    Batches: ``load_photos`` [batch, views, 3, h, w] in [0, 1] (or ``tokens`` [batch, views, tokens, width], what the encoder
    says about them), ``captions`` and ``latents`` [targets * batch, c, h, w] (or ``images`` in [0, 1], encoded here),
    target j of subject i at j * batch + i, ``subject`` [batch]. ``encoder`` is ``denoiser`` (the base itself), a
    released reader's folder, or a timm id, with ``encoder_options``; it is frozen. ``code_targets`` is a file of codes
    fitted beforehand (``python -m data_builder code_targets``) to the first so many subjects, for the weight loss. ``attribute_classifier``
    and ``attribute_loss_weight`` are ``TextToImageTraining``'s; all that a target shows is known, by its prompt or by the photos.
    ``start_from`` is the folder of a released ``ImageToLora`` whose hypernetwork training goes on from. Every
    validation logs the denoising loss of unseen subjects without LoRA, with their own photo's and with another's:
    own < base < shuffled is the sign of learning.
    """

    def __init__(
        self,
        base: str,
        encoder: str,
        output_dir: str,
        preset: str = "attention",
        rank: int = 4,
        hypernetwork: dict[str, Any] | None = None,
        encoder_options: dict[str, Any] | None = None,
        base_options: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        code_targets: str | None = None,
        code_loss_weight: float = 0.0,
        delta_l2_weight: float = 1e-3,
        attribute_classifier: str | None = None,
        attribute_loss_weight: float = 0.0,
        start_from: str | None = None,
        max_views: int = 8,
        lr: float = 3e-4,
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        # a plain attribute in a tuple: the frozen base is no part of the checkpoint
        self._base = (load_diffusion_base(base, **(base_options or {})),)
        layout = make_layout({self.denoiser_name: self.base.denoiser}, preset, rank, self.base.id)
        if encoder == "denoiser":
            image_encoder: Encoder = make_unet_encoder(self.base, **(encoder_options or {}))
        else:
            image_encoder = load_image_encoder(encoder, encoder_options)
        if start_from is None:
            network = Hypernetwork(layout, image_encoder.width, **(hypernetwork or {}))
        else:
            network = ImageToLora.from_pretrained(
                start_from, base=self.base
            ).hypernetwork.requires_grad_(True)
            network.layout.check_compatible(layout)
        self.model = ImageToLora(image_encoder.requires_grad_(False), network, card)
        self.attribute_loss = AttributeLoss(attribute_classifier, attribute_loss_weight)
        self.code_targets = load_file(code_targets)["codes"] if code_targets else None
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
        self.attribute_loss.to(self.device)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.model.encoder.eval()
        features = self._encode_photos(batch)
        num_views = int(
            torch.randint(1, min(features.tokens.shape[1], self.hparams["max_views"]) + 1, ())
        )
        codes = self.model.hypernetwork.predict_codes(ImageFeatures(features.tokens[:, :num_views]))
        weights = self.model.hypernetwork.decode_codes(codes)
        with inject_lora(self.base.denoiser, weights):
            diffusion_loss = self._compute_denoising_loss(
                batch, self.attribute_loss.make_loss_fn(batch.get("labels"))
            )
        delta_l2 = weights.compute_mean_squared_norm()
        loss = diffusion_loss + self.hparams["delta_l2_weight"] * delta_l2
        self.log_dict(
            {"train/loss": diffusion_loss, "train/delta": delta_l2.detach().sqrt()}, prog_bar=True
        )
        if self.code_targets is not None and self.hparams["code_loss_weight"] > 0:
            has_target = batch["subject"] < len(self.code_targets)
            target_codes = self.code_targets.to(codes)[batch["subject"][has_target]]
            code_loss = torch.nn.functional.mse_loss(
                codes[has_target], target_codes, reduction="sum"
            ) / len(codes)
            self.log("train/weights", code_loss)
            loss = loss + self.hparams["code_loss_weight"] * code_loss
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        own_loras = self.model.hypernetwork(ImageFeatures(self._encode_photos(batch).tokens[:, :1]))
        shuffled_loras = own_loras[torch.arange(len(own_loras), device=self.device).roll(1)]
        devices = [self.device] if self.device.type == "cuda" else []
        for name, weights in (
            ("base", own_loras * 0.0),
            ("own", own_loras),
            ("shuffled", shuffled_loras),
        ):
            with torch.random.fork_rng(devices), inject_lora(self.base.denoiser, weights):
                torch.manual_seed(batch_idx)  # the same noise for all three, and every time
                self.log(
                    f"val/{name}",
                    self._compute_denoising_loss(batch),
                    prog_bar=True,
                    batch_size=len(own_loras),
                    sync_dist=True,
                )

    def _encode_photos(self, batch: dict[str, Any]) -> ImageFeatures:
        return (
            ImageFeatures(batch["tokens"])
            if "tokens" in batch
            else self.model.encode_photos(batch["photos"])
        )

    def _compute_denoising_loss(
        self, batch: dict[str, Any], aux_loss_fn: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        latents = (
            batch["latents"] if "latents" in batch else self.base.encode_images(batch["images"])
        )
        conditions = self.base.encode_prompts(batch["captions"])
        # in float32: bfloat16 would round away the little noise of early timesteps
        return compute_denoising_loss(
            self.base.denoiser,
            self.base.noise_schedule,
            latents.float(),
            aux_loss_fn=aux_loss_fn,
            **conditions,
        ).mean()

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.model.save_pretrained(self.hparams["output_dir"])

    def configure_optimizers(self) -> dict[str, Any]:
        return make_adamw_cosine(self, self.model.hypernetwork.parameters(), self.hparams["lr"])
