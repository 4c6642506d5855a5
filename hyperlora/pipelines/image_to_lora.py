"""``ImageToLora``: photos of a subject in, LoRA weights out, in one forward pass."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from hyperlora.data import read_image, to_tensor
from hyperlora.data.images import Source
from hyperlora.encoders import DenoiserEncoder, VisionEncoder
from hyperlora.errors import BadRequest
from hyperlora.features import ImageFeatures
from hyperlora.lora import LoraLayout, LoraWeights
from hyperlora.models import Hypernetwork
from hyperlora.pipelines.bases import Base, load_base
from hyperlora.pipelines.domain import Domain
from hyperlora.pipelines.released import ReleasedModel

Encoder = VisionEncoder | DenoiserEncoder


class ImageToLora(ReleasedModel):
    """A photo encoder and the hypernetwork it conditions: one released artifact.

    ``ImageToLora.from_pretrained(folder_or_hub_id)(["me.jpg"])`` is a LoRA for ``layout.base``. ``card["base"]`` is
    where a model that looks through its base finds it: a hub id, or a path relative to the model's folder;
    ``card["strength"]`` was chosen on validation people (``benchmarks/choose_strength.py``). ``domain`` tells photos
    like those it was trained on from others, where its folder holds one.
    """

    domain: Domain | None = None

    def __init__(self, encoder: Encoder, hypernetwork: Hypernetwork, card: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.encoder, self.hypernetwork = encoder, hypernetwork
        self.card = card or {}

    @property
    def layout(self) -> LoraLayout:
        return self.hypernetwork.layout

    def parts(self) -> dict[str, Any]:
        return {"encoder": self.encoder.config, "hypernetwork": self.hypernetwork.config}

    @classmethod
    def built(cls, config: dict[str, Any], layout: LoraLayout, folder: Path, base: Base | None) -> Self:
        return cls(_encoder(config, folder, base), Hypernetwork(layout, **config["hypernetwork"]))

    @torch.no_grad()
    def __call__(self, images: Source | Sequence[Source], strength: float = 1.0) -> LoraWeights:
        """One LoRA (no batch axis) from one or several photos of the same subject.

        Raises ``BadImage`` for a photo that cannot be read, ``BadRequest`` for none.
        """
        photos = list(images) if isinstance(images, Sequence) and not isinstance(images, str | bytes) else [images]
        weights = self.batch([photos])[0]
        return weights * strength if strength != 1 else weights

    @torch.no_grad()
    def batch(self, subjects: Sequence[Sequence[Source]]) -> LoraWeights:
        """One LoRA per subject (batch axis), each from as many photos as the others."""
        if not subjects or not all(subjects) or len({len(photos) for photos in subjects}) > 1:
            raise BadRequest("every subject needs at least one photo, and all of a batch equally many")
        size = self.encoder.image_size
        photos = torch.stack([torch.stack([to_tensor(read_image(p), size) for p in s]) for s in subjects])
        return self.forward(photos.to(self.device))

    def forward(self, photos: Tensor) -> LoraWeights:
        """photos [batch, views, 3, h, w] in [0, 1]."""
        return self.made(self.features(photos))

    def made(self, features: ImageFeatures) -> LoraWeights:
        """One LoRA per subject (batch axis) from what the encoder says."""
        return self.strong(self.hypernetwork(features))

    @torch.no_grad()
    def features(self, photos: Tensor) -> ImageFeatures:
        """The encoder is frozen everywhere: its features never carry gradients."""
        return self.encoder(photos)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        if self.domain is not None:
            self.domain.save(save_directory)

    def opened(self, folder: Path) -> None:
        self.domain = Domain.load(folder, self.encoder)


def denoiser_encoder(base: Base, **options: Any) -> DenoiserEncoder:
    """The base's own UNet as the encoder of photos, under the empty prompt."""
    text = base.encode_prompts([""])["encoder_hidden_states"]
    return DenoiserEncoder(base.pipeline.vae, base.denoiser, base.noise_schedule, text, **options)


def _encoder(config: dict[str, Any], folder: Path, base: Base | None) -> Encoder:
    options = dict(config["encoder"])
    if options["name"] != "denoiser":
        return VisionEncoder(**options)
    if base is None:
        home = config["card"]["base"]
        base = load_base(folder / home if (folder / home).is_dir() else home)
    del options["name"]
    return denoiser_encoder(base, **options)
