"""Train a diffusion model over LoRAs: what a photo shows to the latents of its subject's LoRA."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from hyperlora.encoders.attribute_classifier import photo_encoder
from hyperlora.features import ImageFeatures
from hyperlora.lora.merge import apart
from hyperlora.models.image_feature_mixer import MixtureOfFeatures
from hyperlora.models.lora_dit import LoraDenoiser, mixed_with
from hyperlora.pipelines.lora_codec import LoraCodec
from hyperlora.pipelines.lora_diffusion import FACE_WIDTH, LoraDiffusion, face_finder
from hyperlora.training.optimizers import adamw_one_cycle


class LoraDiffusionTraining(L.LightningModule):
    """L = ‖x̂(x_t, t, photos) - x‖², x_t = (1 - t) x + t ε, x the latents of a subject's LoRA     (2210.02747)

    t = s u / (1 + (s - 1) u), u uniform; s = ``shift`` > 1 asks more often for much noise, where the photos decide
    (2403.03206, eq. 23). Batches: ``latents`` [n, tokens, width] of LoRAs, and what the model's frozen parts see in
    photos of the same subjects, ``face`` [n, views, 1, width] and ``image`` [n, views, k, width]; a random number of
    the views is told. ``codec`` is a released ``LoraCodec``, ``encoder`` a released reader's folder or a timm id with
    ``encoder_options``, ``face_pack`` a pack for insightface; all three stay frozen. With probability ``unconditional``
    nothing is said of the photos, for guidance. Every validation logs the loss, the cosine of the sampled ΔW to the
    subject's own and to another's, and the mean gate (1 where only the face is heard).
    """

    def __init__(
        self,
        codec: str,
        encoder: str,
        out: str,
        encoder_options: dict[str, Any] | None = None,
        face_pack: str | None = None,
        mixture: dict[str, Any] | None = None,
        denoiser: dict[str, Any] | None = None,
        unconditional: float = 0.1,
        shift: float = 2.0,
        lr: float = 5e-4,
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        vision = photo_encoder(encoder, encoder_options).requires_grad_(False)
        latents = LoraCodec.from_pretrained(codec)
        mixed = MixtureOfFeatures(
            FACE_WIDTH, vision.width, **({"mode": "gate" if face_pack else "image"} | (mixture or {}))
        )
        network = LoraDenoiser(*latents.shape, mixed.width, **(denoiser or {}))
        face = face_finder(face_pack, vision, card or {}) if face_pack else None
        self.model = LoraDiffusion(vision, mixed, network, latents, face, card)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        self.model.encoder.eval()
        self.model.codec.eval()
        views = int(torch.randint(1, batch["image"].shape[1] + 1, ()))
        dropped = torch.rand(len(batch["latents"]), device=self.device) < self.hparams["unconditional"]
        loss = self._loss(batch["latents"], self._told(batch, views)[0], dropped)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        told, gate = self._told(batch, 1)
        latents, n = batch["latents"], len(batch["latents"])
        with torch.random.fork_rng():
            torch.manual_seed(batch_index)  # the same noise every time
            loss = self._loss(latents, told, None)
            noise = torch.randn(n, *self.model.codec.shape).to(self.device)
        made = self.model.codec.decode(self.model.denoiser.sample(told, noise))
        own = self.model.codec.decode(latents)
        other = own[torch.arange(n, device=self.device).roll(1)]
        values = {
            "val/loss": loss, "val/own": apart(own, made)[1].mean(), "val/another": apart(other, made)[1].mean(),
            "val/gate": gate.mean(),
        }  # fmt: skip
        self.log_dict(values, prog_bar=True, batch_size=n, sync_dist=True)

    def _told(self, batch: dict[str, Tensor], views: int) -> tuple[ImageFeatures, Tensor]:
        face, image = (ImageFeatures(batch[name][:, :views]) for name in ("face", "image"))
        return self.model.mixture.mixed(face, image)

    def _loss(self, latents: Tensor, told: ImageFeatures, dropped: Tensor | None) -> Tensor:
        u, shift = torch.rand(len(latents), device=self.device), self.hparams["shift"]
        t = shift * u / (1 + (shift - 1) * u)
        said = self.model.denoiser(mixed_with(torch.randn_like(latents), latents, t), t, told, dropped)
        return torch.nn.functional.mse_loss(said.float(), latents.float())

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.model.save_pretrained(self.hparams["out"])

    def configure_optimizers(self) -> dict[str, Any]:
        trained = [*self.model.mixture.parameters(), *self.model.denoiser.parameters()]
        return adamw_one_cycle(self, trained, self.hparams["lr"])
