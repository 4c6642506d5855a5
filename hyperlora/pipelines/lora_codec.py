"""``LoraCodec``: LoRAs to short latents and back (the LoRA autoencoder of DiffLoRA, 2408.06740)."""

from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor

from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.normalization import LoraNormalizer
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.lora_autoencoder import LoraAutoencoder
from hyperlora.models.lora_pca import FactorwiseLoraPCA, LoraPCA
from hyperlora.pipelines.model_card import ModelCard
from hyperlora.pipelines.pretrained_model import PretrainedModel

Autoencoder = LoraAutoencoder | LoraPCA | FactorwiseLoraPCA
AUTOENCODERS: Final[dict[str, type[Autoencoder]]] = {
    "convolutional": LoraAutoencoder,
    "pca": LoraPCA,
    "factorwise_pca": FactorwiseLoraPCA,
}
"""The autoencoders by their name in ``config.json``."""
_CALIBRATION_BATCH_SIZE: Final = 256


class LoraCodec(PretrainedModel):
    """An autoencoder of normalized LoRA weights, with latents of about unit variance.

    Args:
        normalizer: The statistics of the weights of a dataset.
        autoencoder: A convolutional one, principal components, or principal components of each
            factor and then of all together.
        card: License and the like.

    Attributes:
        latent_std: The standard deviation of the autoencoder's latents, a scalar.
    """

    latent_std: Tensor

    def __init__(
        self,
        normalizer: LoraNormalizer,
        autoencoder: Autoencoder,
        card: ModelCard | None = None,
    ) -> None:
        super().__init__()
        self.normalizer, self.autoencoder = normalizer, autoencoder
        self.card = card or ModelCard()
        self.register_buffer("latent_std", torch.ones(()))

    @property
    def layout(self) -> LoraLayout:
        """The layout of the LoRAs."""
        return self.normalizer.layout

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Tokens and width of the latents of one LoRA."""
        return self.autoencoder.num_tokens, self.autoencoder.latent_width

    def to_config(self) -> dict[str, Any]:
        """Return the kind and the arguments of the autoencoder."""
        kind = next(
            name
            for name, autoencoder_class in AUTOENCODERS.items()
            if isinstance(self.autoencoder, autoencoder_class)
        )
        return {
            "canonical": self.normalizer.canonical,
            "kind": kind,
            "autoencoder": self.autoencoder.config,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], layout: LoraLayout, folder: Path, base: DiffusionBase | None
    ) -> Self:
        """Build the codec with random weights and no statistics.

        Args:
            config: The content of ``config.json``.
            layout: The layout of the LoRAs.
            folder: Not used.
            base: Not used.

        Returns:
            The codec.
        """
        autoencoder = AUTOENCODERS[config["kind"]](layout, **config["autoencoder"])
        return cls(LoraNormalizer(layout, config["canonical"]), autoencoder)

    def encode(self, weights: LoraWeights) -> Tensor:
        """Encode LoRAs as latents [*batch, tokens, width]."""
        return self.encode_flat(weights.flatten())

    def encode_flat(self, rows: Tensor) -> Tensor:
        """Encode flat LoRAs, as datasets hold them.

        Args:
            rows: [batch, P], the numbers of each LoRA in layout order.

        Returns:
            Latents [batch, tokens, width].
        """
        return self.autoencoder.encode(self.normalizer.normalize(rows)) / self.latent_std

    def decode(self, latents: Tensor) -> LoraWeights:
        """Decode latents [*batch, tokens, width] into LoRAs. Undoes ``encode`` approximately."""
        rows = self.normalizer.denormalize(self.autoencoder.decode(latents * self.latent_std))
        return LoraWeights.unflatten(self.layout, rows)

    @classmethod
    def fit_pca(
        cls,
        dataset: LoraDataset,
        num_tokens: int,
        latent_width: int,
        canonical: bool = False,
        components_per_factor: int | None = None,
    ) -> Self:
        """Fit a codec of principal components to a dataset, without training.

        Args:
            dataset: The LoRAs.
            num_tokens: Tokens of the latents of one LoRA.
            latent_width: Width of a token; ``num_tokens * latent_width`` components are kept.
            canonical: Whether the factors are brought to a canonical form before normalization.
            components_per_factor: Components of each factor, of which the joint components are
                taken; None for the joint components alone.

        Returns:
            The codec, calibrated.
        """
        autoencoder: LoraPCA | FactorwiseLoraPCA
        if components_per_factor is None:
            autoencoder = LoraPCA(dataset.layout, num_tokens, latent_width)
        else:
            autoencoder = FactorwiseLoraPCA(
                dataset.layout, num_tokens, latent_width, components_per_factor
            )
        normalizer = dataset.fit_normalizer(canonical)
        rows = torch.cat(list(dataset.iter_batches()))  # [n, P]
        autoencoder.fit(normalizer.normalize(rows))
        codec = cls(normalizer, autoencoder)
        codec.calibrate(rows)
        return codec

    @torch.no_grad()
    def calibrate(self, rows: Tensor) -> None:
        """Set ``latent_std`` to the standard deviation of the latents of rows [n, P].

        Raises:
            InvalidArgumentError: All latents are equal, or some are no numbers.
        """
        self.latent_std.fill_(1.0)
        chunks = rows.split(_CALIBRATION_BATCH_SIZE)
        latents = torch.cat([self.encode_flat(chunk) for chunk in chunks])  # [n, tokens, width]
        std = latents.std()
        if not 0 < std.half() < torch.inf:  # models are saved in float16
            raise InvalidArgumentError(
                f"the latents of {len(rows):,} LoRAs have a standard deviation of {float(std):g}, "
                "a positive number was expected: the LoRAs must differ, fit them with more steps"
            )
        self.latent_std.copy_(std)
