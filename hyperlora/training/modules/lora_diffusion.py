"""Train a diffusion model over LoRAs: what a photo shows to the latents of its subject's LoRA."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from hyperlora.encoders.attribute_classifier import load_image_encoder
from hyperlora.features import ImageFeatures
from hyperlora.lora.merge import compare_deltas
from hyperlora.models.image_feature_mixer import MixedImageFeatures
from hyperlora.models.lora_dit import LoraDiT, interpolate_noise
from hyperlora.pipelines.lora_codec import LoraCodec
from hyperlora.pipelines.lora_diffusion import FACE_EMBED_DIM, LoraDiffusion, make_face_analyzer
from hyperlora.training.optimizers import make_adamw_cosine


class LoraDiffusionTraining(L.LightningModule):
    """L = ‖x̂(x_t, t, photos) - x‖², x_t = (1 - t) x + t ε, x the latents of a subject's LoRA     (2210.02747)

    t = s u / (1 + (s - 1) u), u uniform; s = ``timestep_shift`` > 1 asks more often for much noise, where the photos decide
    (2403.03206, eq. 23). Batches: ``latents`` [n, tokens, width] of LoRAs, and what the model's frozen parts see in
    photos of the same subjects, ``face`` [n, views, 1, width] and ``image`` [n, views, k, width]; a random number of
    the views is told. ``codec`` is a released ``LoraCodec``, ``encoder`` a released reader's folder or a timm id with
    ``encoder_options``, ``export_face_pack`` a pack for insightface; all three stay frozen. With probability ``cond_dropout_prob``
    nothing is said of the photos, for guidance. Every validation logs the loss, the cosine of the sampled ΔW to the
    subject's own and to another's, and the mean gate (1 where only the face is heard).
    """

    def __init__(
        self,
        codec: str,
        encoder: str,
        output_dir: str,
        encoder_options: dict[str, Any] | None = None,
        face_pack: str | None = None,
        mixture: dict[str, Any] | None = None,
        denoiser: dict[str, Any] | None = None,
        cond_dropout_prob: float = 0.1,
        timestep_shift: float = 2.0,
        lr: float = 5e-4,
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        image_encoder = load_image_encoder(encoder, encoder_options).requires_grad_(False)
        lora_codec = LoraCodec.from_pretrained(codec)
        feature_mixer = MixedImageFeatures(
            FACE_EMBED_DIM,
            image_encoder.width,
            **({"mode": "gate" if face_pack else "image"} | (mixture or {})),
        )
        network = LoraDiT(*lora_codec.latent_shape, feature_mixer.width, **(denoiser or {}))
        face_analyzer = (
            make_face_analyzer(face_pack, image_encoder, card or {}) if face_pack else None
        )
        self.model = LoraDiffusion(
            image_encoder, feature_mixer, network, lora_codec, face_analyzer, card
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.model.encoder.eval()
        self.model.codec.eval()
        num_views = int(torch.randint(1, batch["image"].shape[1] + 1, ()))
        drop_mask = (
            torch.rand(len(batch["latents"]), device=self.device)
            < self.hparams["cond_dropout_prob"]
        )
        loss = self._compute_loss(
            batch["latents"], self._mix_features(batch, num_views)[0], drop_mask
        )
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        cond_features, gate = self._mix_features(batch, 1)
        latents, batch_size = batch["latents"], len(batch["latents"])
        with torch.random.fork_rng():
            torch.manual_seed(batch_idx)  # the same noise every time
            loss = self._compute_loss(latents, cond_features, None)
            noise = torch.randn(batch_size, *self.model.codec.latent_shape).to(self.device)
        sampled_loras = self.model.codec.decode(self.model.denoiser.sample(cond_features, noise))
        target_loras = self.model.codec.decode(latents)
        shuffled_loras = target_loras[torch.arange(batch_size, device=self.device).roll(1)]
        metrics = {
            "val/loss": loss,
            "val/own": compare_deltas(target_loras, sampled_loras)[1].mean(),
            "val/another": compare_deltas(shuffled_loras, sampled_loras)[1].mean(),
            "val/gate": gate.mean(),
        }
        self.log_dict(metrics, prog_bar=True, batch_size=batch_size, sync_dist=True)

    def _mix_features(
        self, batch: dict[str, Tensor], num_views: int
    ) -> tuple[ImageFeatures, Tensor]:
        face_features, image_features = (
            ImageFeatures(batch[name][:, :num_views]) for name in ("face", "image")
        )
        return self.model.mixture.forward_with_gate(face_features, image_features)

    def _compute_loss(
        self, latents: Tensor, cond_features: ImageFeatures, drop_mask: Tensor | None
    ) -> Tensor:
        u, shift = torch.rand(len(latents), device=self.device), self.hparams["timestep_shift"]
        timesteps = shift * u / (1 + (shift - 1) * u)
        model_output = self.model.denoiser(
            interpolate_noise(torch.randn_like(latents), latents, timesteps),
            timesteps,
            cond_features,
            drop_mask,
        )
        return torch.nn.functional.mse_loss(model_output.float(), latents.float())

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.model.save_pretrained(self.hparams["output_dir"])

    def configure_optimizers(self) -> dict[str, Any]:
        trainable_params = [*self.model.mixture.parameters(), *self.model.denoiser.parameters()]
        return make_adamw_cosine(self, trainable_params, self.hparams["lr"])
