"""Train the image autoencoder (a diffusers ``AutoencoderKL``) of the avatar world."""

from pathlib import Path

import lightning as L
import torch
from diffusers import AutoencoderKL
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F

from hyperlora.training.batches import ImageLatentBatch
from hyperlora.training.modules.options import Options
from hyperlora.training.optimizers import make_adamw_cosine, make_muon_cosine, split_muon_params


class VaeTraining(L.LightningModule):
    """Train an autoencoder on L1, squared error, L1 of image gradients and a small KL divergence.

    The squared error keeps the colors of regions, the image gradients keep edges sharp. With a
    large ``gradient_weight`` edges win: the colors of whole regions drift.

    Batches are images [n, 3, h, w] in [-1, 1]. When training ends, every latent channel is brought
    to zero mean and unit variance, measured on the last validation.

    Args:
        output_dir: Folder that receives the diffusers model when training ends.
        config: Arguments of a new ``AutoencoderKL``; give either this or ``start_from``.
        start_from: Folder of an ``AutoencoderKL`` to continue from. Its latents change; use
            ``VaeDecoderTraining`` where they must not.
        lr: Peak learning rate of AdamW.
        mse_weight: Weight of the squared error.
        gradient_weight: Weight of the L1 error of image gradients.
        kl_weight: Weight of the KL divergence to a unit Gaussian per latent value.

    Raises:
        ValueError: Both or none of ``config`` and ``start_from`` are given.
    """

    def __init__(
        self,
        output_dir: str,
        config: Options | None = None,
        start_from: str | None = None,
        lr: float = 1e-3,
        mse_weight: float = 4.0,
        gradient_weight: float = 0.25,
        kl_weight: float = 1e-4,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if (config is None) == (start_from is None):
            raise ValueError(
                "give either config (a new autoencoder) or start_from (a folder), not both or none"
            )
        self.vae = (
            AutoencoderKL.from_pretrained(start_from)
            if start_from
            else AutoencoderKL(**(config or {}))
        )
        self.vae.to(memory_format=torch.channels_last)

    def training_step(self, images: Tensor, batch_idx: int) -> Tensor:
        """Compute the loss of a sampled reconstruction.

        Args:
            images: [n, 3, h, w] in [-1, 1].
            batch_idx: Not used.

        Returns:
            Loss, a scalar.
        """
        images_nhwc = images.contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(images_nhwc).latent_dist
        latents = posterior.sample()  # [n, c, h / f, w / f]
        decoded = self.vae.decode(latents).sample.float()  # [n, 3, h, w]
        loss = _compute_reconstruction_loss(self, decoded, images)
        return loss + self.hparams["kl_weight"] * posterior.kl().mean() / latents[0].numel()

    def validation_step(self, images: Tensor, batch_idx: int) -> None:
        """Log the PSNR of reconstructions and keep latents to standardize them by.

        Args:
            images: [n, 3, h, w] in [-1, 1].
            batch_idx: Not used.
        """
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.mode()).sample.float()  # [n, 3, h, w]
        self.log("val/psnr", _compute_psnr(decoded, images), prog_bar=True, sync_dist=True)
        self.validation_latents.append(posterior.sample().float().cpu())

    def on_validation_epoch_start(self) -> None:
        """Start to collect latents [n, c, h, w]."""
        self.validation_latents: list[Tensor] = []

    def on_train_end(self) -> None:
        """Standardize the latents and write the model."""
        if self.trainer.is_global_zero:
            standardize_latents(self.vae, torch.cat(self.validation_latents))
            self.vae.save_pretrained(Path(self.hparams["output_dir"]))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make AdamW with one cosine cycle."""
        return make_adamw_cosine(self, self.parameters(), self.hparams["lr"], weight_decay=1e-4)


class VaeDecoderTraining(L.LightningModule):
    """Train the decoder of a released autoencoder alone, on the errors of ``VaeTraining``.

    The latents stay as they are, and so does every network that works on them. Noise on the
    latents prepares the decoder for latents of a denoiser, which never equal those of an image.
    When training ends, the model is written as fp16 if that leaves the encoder's weights exact.

    Args:
        output_dir: Folder that receives the diffusers model when training ends.
        start_from: Folder of an ``AutoencoderKL``.
        lr: Peak learning rate of ``Muon``.
        mse_weight: Weight of the squared error.
        gradient_weight: Weight of the L1 error of image gradients.
        max_noise_std: Largest standard deviation of the noise on latents (which have unit
            variance); each image gets a uniform fraction of it.
    """

    def __init__(
        self,
        output_dir: str,
        start_from: str,
        lr: float = 1e-3,
        mse_weight: float = 4.0,
        gradient_weight: float = 0.25,
        max_noise_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.vae = AutoencoderKL.from_pretrained(start_from).to(memory_format=torch.channels_last)
        self.vae.encoder.requires_grad_(False)
        if self.vae.quant_conv is not None:
            self.vae.quant_conv.requires_grad_(False)

    def training_step(self, batch: ImageLatentBatch, batch_idx: int) -> Tensor:
        """Compute the reconstruction loss of noisy latents.

        Args:
            batch: Images with their latents.
            batch_idx: Not used.

        Returns:
            Loss, a scalar.
        """
        latents = batch.latents  # [n, c, h / f, w / f]
        noise_std = self.hparams["max_noise_std"] * torch.rand(
            len(latents), 1, 1, 1, device=self.device
        )  # [n, 1, 1, 1]
        decoded = self._decode_latents(latents + noise_std * torch.randn_like(latents))
        return _compute_reconstruction_loss(self, decoded, batch.images)

    def validation_step(self, batch: ImageLatentBatch, batch_idx: int) -> None:
        """Log PSNR and L1 of reconstructions without noise.

        Args:
            batch: Images with their latents.
            batch_idx: Not used.
        """
        decoded = self._decode_latents(batch.latents)  # [n, 3, h, w]
        metrics = {
            "val/psnr": _compute_psnr(decoded, batch.images),
            "val/l1": F.l1_loss(decoded, batch.images),
        }
        self.log_dict(metrics, prog_bar=True)

    def _decode_latents(self, latents: Tensor) -> Tensor:
        """Decode scaled latents [n, c, h / f, w / f] to images [n, 3, h, w]."""
        config = self.vae.config
        unscaled_latents = latents / config.scaling_factor + (config.shift_factor or 0)
        latents_nhwc = unscaled_latents.contiguous(memory_format=torch.channels_last)
        return self.vae.decode(latents_nhwc).sample.float()

    def on_train_end(self) -> None:
        """Write the model."""
        if self.trainer.is_global_zero:
            is_half_exact = all(
                torch.equal(p, p.half().to(p)) for p in self.vae.encoder.parameters()
            )
            vae = self.vae.half() if is_half_exact else self.vae
            vae.save_pretrained(Path(self.hparams["output_dir"]))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make Muon for the hidden matrices and AdamW for all else, with one cosine cycle."""
        matrices, other_params = split_muon_params(
            self.vae.named_parameters(), ("post_quant_conv", "decoder.conv_in", "decoder.conv_out")
        )
        return make_muon_cosine(self, matrices, other_params, self.hparams["lr"], weight_decay=1e-4)


def _compute_reconstruction_loss(
    module: L.LightningModule, decoded: Tensor, images: Tensor
) -> Tensor:
    """Compute and log the weighted errors of images [n, 3, h, w]."""
    l1 = F.l1_loss(decoded, images)
    # L1 of finite differences along height and width
    gradient_loss = sum(
        F.l1_loss(torch.diff(decoded, dim=axis), torch.diff(images, dim=axis)) for axis in (2, 3)
    )
    module.log_dict({"train/l1": l1, "train/psnr": _compute_psnr(decoded, images)}, prog_bar=True)
    loss = l1 + module.hparams["mse_weight"] * F.mse_loss(decoded, images)
    return loss + module.hparams["gradient_weight"] * gradient_loss


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, latents: Tensor) -> None:
    """Give each latent channel of an autoencoder zero mean and unit variance, in place.

    ``quant_conv`` is rescaled to z' = (z - mean) / std, and ``post_quant_conv`` to undo it:
    reconstructions stay the same. The scaling factor becomes 1.

    Args:
        vae: Autoencoder with 1x1 convolutions around its latents.
        latents: Samples of its latents [n, c, h, w], by which mean and variance are measured.
    """
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))  # [c], [c]
    channels = len(std)
    quant_conv, post_quant_conv = vae.quant_conv, vae.post_quant_conv
    # the first c output channels are the posterior's mean, the others its log variance
    quant_conv.bias[:channels].sub_(mean).div_(std)
    quant_conv.weight[:channels].div_(std[:, None, None, None])
    quant_conv.bias[channels:].sub_(2 * std.log())
    # W (std z' + mean) + b = (W std) z' + (b + W mean)
    post_quant_conv.bias.add_(post_quant_conv.weight[:, :, 0, 0] @ mean)
    post_quant_conv.weight.mul_(std[None, :, None, None])
    vae.register_to_config(scaling_factor=1.0)


def _compute_psnr(decoded: Tensor, images: Tensor) -> Tensor:
    """Compute the mean peak signal-to-noise ratio in dB of images [n, 3, h, w] in [-1, 1]."""
    mse = (decoded.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3)) / 4  # [n], on the unit range
    return (-10 * mse.clamp_min(1e-10).log10()).mean()
