"""``LoraCodec``: LoRAs to short latents and back: a released autoencoder with the statistics of its dataset (LAE)."""

from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor

from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.diffusion.diffusion_base import Base
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.normalization import RowScale
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.lora_autoencoder import LoraAutoencoder
from hyperlora.models.lora_pca import LinearAutoencoder, PartedAutoencoder
from hyperlora.pipelines.pretrained_model import ReleasedModel

Autoencoder = LoraAutoencoder | LinearAutoencoder | PartedAutoencoder
KINDS: Final[dict[str, type[Autoencoder]]] = {
    "convolutional": LoraAutoencoder, "linear": LinearAutoencoder, "parted": PartedAutoencoder
}  # fmt: skip


class LoraCodec(ReleasedModel):
    """``encode`` gives latents [*batch, tokens, width] of about unit variance, ``decode`` brings them back.

    ``kind`` of the autoencoder is ``convolutional``, ``linear`` (principal components) or ``parted`` (of each factor,
    then of all together).
    """

    latent_std: Tensor

    def __init__(self, scale: RowScale, autoencoder: Autoencoder, card: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.scale, self.autoencoder = scale, autoencoder
        self.card = card or {}
        self.register_buffer("latent_std", torch.ones(()))

    @property
    def layout(self) -> LoraLayout:
        return self.scale.layout

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and width of the latents of one LoRA."""
        return self.autoencoder.tokens, self.autoencoder.width

    def parts(self) -> dict[str, Any]:
        kind = next(name for name, of in KINDS.items() if isinstance(self.autoencoder, of))
        return {"balanced": self.scale.balanced, "kind": kind, "autoencoder": self.autoencoder.config}

    @classmethod
    def built(cls, config: dict[str, Any], layout: LoraLayout, folder: Path, base: Base | None) -> Self:
        autoencoder = KINDS[config["kind"]](layout, **config["autoencoder"])
        return cls(RowScale(layout, config["balanced"]), autoencoder)

    def encode(self, weights: LoraWeights) -> Tensor:
        return self.encode_rows(weights.flatten())

    def encode_rows(self, rows: Tensor) -> Tensor:
        """Of rows [batch, P] as datasets hold them."""
        return self.autoencoder.encode(self.scale.normalize(rows)) / self.latent_std

    def decode(self, latents: Tensor) -> LoraWeights:
        rows = self.scale.unnormalize(self.autoencoder.decode(latents * self.latent_std))
        return LoraWeights.unflatten(self.layout, rows)

    @classmethod
    def of_principal_components(
        cls, data: LoraDataset, tokens: int, width: int, balanced: bool = False, each: int | None = None
    ) -> Self:
        """The linear codec of a dataset, or with ``each`` the parted one: nothing to train."""
        components: LinearAutoencoder | PartedAutoencoder
        if each is None:
            components = LinearAutoencoder(data.layout, tokens, width)
        else:
            components = PartedAutoencoder(data.layout, tokens, width, each)
        scale = data.scale(balanced)
        rows = torch.cat(list(data.batches()))
        components.learn(scale.normalize(rows))
        made = cls(scale, components)
        made.measure(rows)
        return made

    @torch.no_grad()
    def measure(self, rows: Tensor) -> None:
        """Take the latents' standard deviation from rows [n, P]."""
        self.latent_std.fill_(1.0)
        self.latent_std.copy_(torch.cat([self.encode_rows(some) for some in rows.split(256)]).std())
