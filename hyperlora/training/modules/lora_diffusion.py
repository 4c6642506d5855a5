"""Train a diffusion model over LoRAs (DiffLoRA, 2408.06740): from photos to latents of LoRAs."""

import logging

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F

from hyperlora.compute import fork_rng
from hyperlora.encoders.attribute_classifier import load_image_encoder
from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.features import ImageFeatures
from hyperlora.lora.merge import compare_deltas
from hyperlora.models.image_feature_mixer import MixedImageFeatures
from hyperlora.models.latent_regression import LatentRegression
from hyperlora.models.lora_autoencoder import LoraAutoencoder
from hyperlora.models.lora_dit import LoraDiT, interpolate_noise
from hyperlora.pipelines.lora_codec import LoraCodec
from hyperlora.pipelines.lora_diffusion import FACE_EMBED_DIM, LoraDiffusion, make_face_analyzer
from hyperlora.pipelines.model_card import ModelCard
from hyperlora.training.batches import LoraPhotoBatch
from hyperlora.training.modules.options import Options
from hyperlora.training.optimizers import make_adamw_cosine

_logger = logging.getLogger(__name__)


class LoraDiffusionTraining(L.LightningModule):
    """Train a denoiser that predicts the clean latents of a subject's LoRA, by flow matching.

    L = ‖x̂(x_t, t, photos) - x‖² with x_t = (1 - t) x + t ε (2210.02747). Timesteps are
    t = s u / (1 + (s - 1) u), u uniform, s = ``timestep_shift`` (2403.03206, eq. 23).

    Validation logs the loss, the cosine of the sampled ΔW to the subject's own and to another
    subject's, and the mean gate of the mixture (1 where only the face counts).

    Args:
        codec: Folder of a released ``LoraCodec``, which stays frozen.
        encoder: Folder of a released ``AttributeClassifier``, or a timm id. It stays frozen.
        output_dir: Folder that receives the ``LoraDiffusion`` when training ends.
        encoder_options: Arguments of the encoder.
        face_pack: Folder or name of an insightface pack beside the encoder; None for none.
        mixture: Arguments of ``MixedImageFeatures``.
        denoiser: Arguments of ``LoraDiT``.
        regression_rank: Rank of a ``LatentRegression``, which is fitted before the first step; the
            denoiser learns what it leaves. None for no regression.
        cond_dropout_prob: Probability of dropping the photos, for classifier-free guidance.
        timestep_shift: s; above 1, noisier timesteps come more often. The photos have the most
            influence there.
        lr: Peak learning rate of AdamW.
        card: Fields of the released ``ModelCard``.
    """

    def __init__(
        self,
        codec: str,
        encoder: str,
        output_dir: str,
        encoder_options: Options | None = None,
        face_pack: str | None = None,
        mixture: Options | None = None,
        denoiser: Options | None = None,
        regression_rank: int | None = None,
        cond_dropout_prob: float = 0.1,
        timestep_shift: float = 2.0,
        lr: float = 5e-4,
        card: Options | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        model_card = ModelCard.from_dict(card or {})
        image_encoder = load_image_encoder(encoder, encoder_options).requires_grad_(False)
        lora_codec = LoraCodec.from_pretrained(codec)
        mixture_options: Options = {"mode": "gate" if face_pack else "image"} | (mixture or {})
        feature_mixer = MixedImageFeatures(FACE_EMBED_DIM, image_encoder.width, **mixture_options)
        network = LoraDiT(*lora_codec.latent_shape, feature_mixer.width, **(denoiser or {}))
        face_analyzer = (
            make_face_analyzer(face_pack, image_encoder, model_card) if face_pack else None
        )
        regression = None
        if regression_rank is not None:
            regression = LatentRegression(
                *lora_codec.latent_shape,
                (0, 0) if feature_mixer.mode == "face" else _compute_image_shape(image_encoder),
                FACE_EMBED_DIM if face_pack and feature_mixer.mode != "image" else 0,
                regression_rank,
            )
        self.model = LoraDiffusion(
            image_encoder, feature_mixer, network, lora_codec, face_analyzer, model_card, regression
        )

    def on_train_start(self) -> None:
        """Fit the regression to the training data, unless a checkpoint holds it."""
        regression = self.model.regression
        if regression is None or regression.has_coefficients:
            return
        batches: list[LoraPhotoBatch] = list(self.trainer.train_dataloader)
        features = torch.cat(
            [
                regression.flatten_features(
                    ImageFeatures(batch.face_features), ImageFeatures(batch.image_features)
                )
                for batch in batches
            ]
        )
        latents = torch.cat([batch.latents for batch in batches])
        penalty = regression.cpu().fit(features, latents)
        regression.to(self.device)
        for buffer in regression.buffers():  # processes see different subjects
            buffer.copy_(self.trainer.strategy.broadcast(buffer))
        _logger.info("regression of latents on photos: penalty of %g per photo", penalty)

    def training_step(self, batch: LoraPhotoBatch, batch_idx: int) -> Tensor:
        """Compute the loss with a random number of photos.

        Args:
            batch: Latents of LoRAs with features of photos.
            batch_idx: Not used.

        Returns:
            Loss, a scalar.
        """
        self.model.encoder.eval()
        self.model.codec.eval()
        num_views = int(torch.randint(1, batch.image_features.shape[1] + 1, ()))
        drop_mask = (
            torch.rand(len(batch.latents), device=self.device) < self.hparams["cond_dropout_prob"]
        )  # [n]
        cond_features, _ = self._mix_features(batch, num_views)
        mean = self._estimate_mean(batch, num_views)
        loss = self._compute_loss(batch.latents, cond_features, drop_mask, mean)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: LoraPhotoBatch, batch_idx: int) -> None:
        """Log loss, cosines and gate for one photo, with the same noise in every validation.

        Args:
            batch: Latents of LoRAs with features of photos.
            batch_idx: Seed of the noise.
        """
        cond_features, gate = self._mix_features(batch, 1)
        mean = self._estimate_mean(batch, 1)
        latents, n = batch.latents, len(batch.latents)
        with fork_rng(self.device):
            torch.manual_seed(batch_idx)
            loss = self._compute_loss(latents, cond_features, None, mean)
            noise = torch.randn(n, *self.model.codec.latent_shape).to(self.device)
        samples = self.model.codec.decode(
            self.model.denoiser.sample(cond_features, noise, mean=mean)
        )
        targets = self.model.codec.decode(latents)
        _, cosine_own = compare_deltas(targets, samples)  # [n]
        _, cosine_shuffled = compare_deltas(targets.shuffle_batch(), samples)  # [n]
        metrics = {
            "val/loss": loss,
            "val/cosine_own": cosine_own.mean(),
            "val/cosine_shuffled": cosine_shuffled.mean(),
            "val/face_gate": gate.mean(),
        }
        self.log_dict(metrics, prog_bar=True, batch_size=n, sync_dist=True)

    def _mix_features(self, batch: LoraPhotoBatch, num_views: int) -> tuple[ImageFeatures, Tensor]:
        """Mix the features of the first photos: tokens and gate [n, views, tokens, width]."""
        return self.model.mixture.forward_with_gate(
            ImageFeatures(batch.face_features[:, :num_views]),
            ImageFeatures(batch.image_features[:, :num_views]),
        )

    def _estimate_mean(self, batch: LoraPhotoBatch, num_views: int) -> Tensor | None:
        """Estimate the latents [n, tokens, width] from the first photos by regression, if any."""
        if self.model.regression is None:
            return None
        mean: Tensor = self.model.regression(
            ImageFeatures(batch.face_features[:, :num_views]),
            ImageFeatures(batch.image_features[:, :num_views]),
        )
        return mean

    def _compute_loss(
        self,
        latents: Tensor,
        cond_features: ImageFeatures,
        drop_mask: Tensor | None,
        mean: Tensor | None,
    ) -> Tensor:
        """Compute the squared error of predicted clean latents [n, tokens, width]."""
        u, shift = torch.rand(len(latents), device=self.device), self.hparams["timestep_shift"]
        timesteps = shift * u / (1 + (shift - 1) * u)  # [n]
        noisy_latents = interpolate_noise(torch.randn_like(latents), latents, timesteps)
        model_output = self.model.denoiser(noisy_latents, timesteps, cond_features, drop_mask, mean)
        return F.mse_loss(model_output.float(), latents.float())

    def on_train_end(self) -> None:
        """Write the model, without the encoder of LoRAs, which generating does not need."""
        if self.trainer.is_global_zero:
            if isinstance(self.model.codec.autoencoder, LoraAutoencoder):
                self.model.codec.autoencoder.drop_encoder()
            self.model.save_pretrained(self.hparams["output_dir"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make AdamW for mixture and denoiser, with one cosine cycle."""
        trainable_params = [*self.model.mixture.parameters(), *self.model.denoiser.parameters()]
        return make_adamw_cosine(self, trainable_params, self.hparams["lr"])


@torch.no_grad()
def _compute_image_shape(encoder: TimmEncoder) -> tuple[int, int]:
    """Compute the tokens of an image and their width, by a gray one."""
    size, was_training = encoder.image_size, encoder.training
    encoder.eval()  # the image is no data for the statistics of a batch norm
    tokens = encoder(torch.full((1, 1, 3, size, size), 0.5)).tokens  # [1, 1, tokens, width]
    encoder.train(was_training)
    return tokens.shape[2], tokens.shape[3]
