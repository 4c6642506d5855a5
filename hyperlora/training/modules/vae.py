"""Train the image autoencoder (a diffusers ``AutoencoderKL``) of the embedded world."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from hyperlora.training.optimizers import make_adamw_cosine, make_muon_cosine, split_muon_params


class VaeTraining(L.LightningModule):
    """L1 + squared error (colours) + L1 of image gradients (crisp edges) + a small KL; batches are images
    [batch, 3, h, w] in [-1, 1]. With a large ``gradient_weight`` edges win over colours: whole regions drift.

    ``output_dir`` receives the diffusers folder when training ends, with every latent channel brought to zero mean and unit
    variance (measured in the last validation, folded into the two 1x1 convolutions around the latents).
    ``start_from`` continues a released autoencoder; ``VaeDecoderTraining`` does so without moving its latents.
    """

    def __init__(
        self,
        output_dir: str,
        config: dict[str, Any] | None = None,
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
        posterior = self.vae.encode(
            images.contiguous(memory_format=torch.channels_last)
        ).latent_dist
        z = posterior.sample()
        loss = _compute_reconstruction_loss(self, self.vae.decode(z).sample.float(), images)
        return loss + self.hparams["kl_weight"] * posterior.kl().mean() / z[0].numel()

    def validation_step(self, images: Tensor, batch_idx: int) -> None:
        posterior = self.vae.encode(images).latent_dist
        self.log(
            "val/psnr",
            _compute_psnr(self.vae.decode(posterior.mode()).sample.float(), images),
            prog_bar=True,
        )
        self.validation_latents.append(posterior.sample().float().cpu())

    def on_validation_epoch_start(self) -> None:
        self.validation_latents: list[Tensor] = []

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            standardize_latents(self.vae, torch.cat(self.validation_latents))
            self.vae.save_pretrained(Path(self.hparams["output_dir"]))

    def configure_optimizers(self) -> dict[str, Any]:
        return make_adamw_cosine(self, self.parameters(), self.hparams["lr"], weight_decay=1e-4)


class VaeDecoderTraining(L.LightningModule):
    """Goes on with the decoder of a released autoencoder (``start_from``) alone, by ``Muon`` and the errors of
    ``VaeTraining``: its latents, and so all that works on them, stay as they are. Batches are images [batch, 3, h,
    w] in [-1, 1] and their scaled latents [batch, c, h, w]. Of each picture so much ``max_noise_std`` at most, of the latents'
    own size, is added to them: what a denoiser makes is never quite a picture's.

    ``output_dir`` receives the diffusers folder when training ends, fp16 if that leaves the encoder as it is.
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

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        images, latents = batch
        noise_std = self.hparams["max_noise_std"] * torch.rand(
            len(latents), 1, 1, 1, device=self.device
        )
        return _compute_reconstruction_loss(
            self, self._decode_latents(latents + noise_std * torch.randn_like(latents)), images
        )

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        images, latents = batch
        decoded = self._decode_latents(latents)
        self.log_dict(
            {"val/psnr": _compute_psnr(decoded, images), "val/l1": F.l1_loss(decoded, images)},
            prog_bar=True,
        )

    def _decode_latents(self, latents: Tensor) -> Tensor:
        unscaled_latents = latents / self.vae.config.scaling_factor + (
            self.vae.config.shift_factor or 0
        )
        return self.vae.decode(
            unscaled_latents.contiguous(memory_format=torch.channels_last)
        ).sample.float()

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            is_half_exact = all(
                torch.equal(p, p.half().to(p)) for p in self.vae.encoder.parameters()
            )
            (self.vae.half() if is_half_exact else self.vae).save_pretrained(
                Path(self.hparams["output_dir"])
            )

    def configure_optimizers(self) -> dict[str, Any]:
        matrices, other_params = split_muon_params(
            self.vae.named_parameters(), ("post_quant_conv", "decoder.conv_in", "decoder.conv_out")
        )
        return make_muon_cosine(self, matrices, other_params, self.hparams["lr"], weight_decay=1e-4)


def _compute_reconstruction_loss(
    module: L.LightningModule, decoded: Tensor, images: Tensor
) -> Tensor:
    """The three errors, weighed as the module's hyperparameters say."""
    l1 = F.l1_loss(decoded, images)
    gradient_loss = sum(
        F.l1_loss(torch.diff(decoded, dim=d), torch.diff(images, dim=d)) for d in (2, 3)
    )
    module.log_dict({"train/l1": l1, "train/psnr": _compute_psnr(decoded, images)}, prog_bar=True)
    loss = l1 + module.hparams["squared_weight"] * F.mse_loss(decoded, images)
    return loss + module.hparams["gradient_weight"] * gradient_loss


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, latents: Tensor) -> None:
    """Give each channel of ``vae``'s latents zero mean and unit variance, measured on ``validation_latents`` [n, c, h, w], by
    rescaling ``quant_conv`` and undoing it in ``post_quant_conv``: reconstructions stay the same."""
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    channels = len(std)
    quant_conv, post_quant_conv = vae.quant_conv, vae.post_quant_conv
    quant_conv.bias[:channels].sub_(mean).div_(std)
    quant_conv.weight[:channels].div_(std[:, None, None, None])
    quant_conv.bias[channels:].sub_(
        2 * std.log()
    )  # the other half of the channels is the posterior's log variance
    post_quant_conv.bias.add_(post_quant_conv.weight[:, :, 0, 0] @ mean)
    post_quant_conv.weight.mul_(std[None, :, None, None])
    vae.register_to_config(scaling_factor=1.0)


def _compute_psnr(decoded: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, images in [-1, 1]."""
    mse = (decoded.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3)) / 4
    return (-10 * mse.clamp_min(1e-10).log10()).mean()
