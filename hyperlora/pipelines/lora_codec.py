"""``LoraCodec``: LoRAs to short latents and back: a released autoencoder with the statistics of its dataset (LAE)."""

from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor

from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.normalization import LoraNormalizer
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.lora_autoencoder import LoraAutoencoder
from hyperlora.models.lora_pca import FactorwiseLoraPCA, LoraPCA
from hyperlora.pipelines.pretrained_model import PretrainedModel

Autoencoder = LoraAutoencoder | LoraPCA | FactorwiseLoraPCA
AUTOENCODERS: Final[dict[str, type[Autoencoder]]] = {
    "convolutional": LoraAutoencoder,
    "linear": LoraPCA,
    "parted": FactorwiseLoraPCA,
}


class LoraCodec(PretrainedModel):
    """``encode`` gives latents [*batch, tokens, width] of about unit variance, ``decode`` brings them back.

    ``kind`` of the autoencoder is ``convolutional``, ``linear`` (principal components) or ``parted`` (of each factor,
    then of all together).
    """

    latent_std: Tensor

    def __init__(
        self,
        normalizer: LoraNormalizer,
        autoencoder: Autoencoder,
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.normalizer, self.autoencoder = normalizer, autoencoder
        self.card = card or {}
        self.register_buffer("latent_std", torch.ones(()))

    @property
    def layout(self) -> LoraLayout:
        return self.normalizer.layout

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Tokens and width of the latents of one LoRA."""
        return self.autoencoder.num_tokens, self.autoencoder.latent_width

    def to_config(self) -> dict[str, Any]:
        kind = next(
            name
            for name, autoencoder_class in AUTOENCODERS.items()
            if isinstance(self.autoencoder, autoencoder_class)
        )
        return {
            "balanced": self.normalizer.canonical,
            "kind": kind,
            "autoencoder": self.autoencoder.config,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], layout: LoraLayout, folder: Path, base: DiffusionBase | None
    ) -> Self:
        autoencoder = AUTOENCODERS[config["kind"]](layout, **config["autoencoder"])
        return cls(LoraNormalizer(layout, config["balanced"]), autoencoder)

    def encode(self, weights: LoraWeights) -> Tensor:
        return self.encode_flat(weights.flatten())

    def encode_flat(self, rows: Tensor) -> Tensor:
        """Of rows [batch, P] as datasets hold them."""
        return self.autoencoder.encode(self.normalizer.normalize(rows)) / self.latent_std

    def decode(self, latents: Tensor) -> LoraWeights:
        rows = self.normalizer.denormalize(self.autoencoder.decode(latents * self.latent_std))
        return LoraWeights.unflatten(self.layout, rows)

    @classmethod
    def fit_pca(
        cls,
        dataset: LoraDataset,
        tokens: int,
        width: int,
        canonical: bool = False,
        components_per_factor: int | None = None,
    ) -> Self:
        """The linear codec of a dataset, or with ``components_per_factor`` the parted one: nothing to train."""
        autoencoder: LoraPCA | FactorwiseLoraPCA
        if components_per_factor is None:
            autoencoder = LoraPCA(dataset.layout, tokens, width)
        else:
            autoencoder = FactorwiseLoraPCA(dataset.layout, tokens, width, components_per_factor)
        normalizer = dataset.fit_normalizer(canonical)
        rows = torch.cat(list(dataset.iter_batches()))
        autoencoder.fit(normalizer.normalize(rows))
        codec = cls(normalizer, autoencoder)
        codec.calibrate(rows)
        return codec

    @torch.no_grad()
    def calibrate(self, rows: Tensor) -> None:
        """Take the latents' standard deviation from rows [n, P]."""
        self.latent_std.fill_(1.0)
        self.latent_std.copy_(
            torch.cat([self.encode_flat(chunk) for chunk in rows.split(256)]).std()
        )
