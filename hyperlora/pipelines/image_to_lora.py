"""``ImageToLora``: photos of a subject in, LoRA weights out, in one forward pass."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hyperlora.data import read_image, to_tensor
from hyperlora.data.images import Source
from hyperlora.encoders import DenoiserEncoder, VisionEncoder
from hyperlora.errors import BadArtifact, BadRequest
from hyperlora.features import ImageFeatures
from hyperlora.lora import LoraLayout, LoraWeights
from hyperlora.models import Hypernetwork
from hyperlora.pipelines.bases import Base, load_base

_FILES = ("config.json", "layout.json", "model.safetensors")

Encoder = VisionEncoder | DenoiserEncoder


class ImageToLora(nn.Module, ModelHubMixin):
    """A photo encoder and the hypernetwork it conditions: one released artifact.

    ``ImageToLora.from_pretrained(folder_or_hub_id)(["me.jpg"])`` is a LoRA for ``layout.base``. ``card`` holds free
    facts (trigger word, licence, how it was trained) that travel in ``config.json``; ``card["base"]`` is where a model
    that looks through its base finds it: a hub id, or a path relative to the model's folder; ``card["strength"]``
    multiplies every LoRA it makes (chosen on validation people, see ``benchmarks/choose_strength.py``).
    """

    def __init__(self, encoder: Encoder, hypernetwork: Hypernetwork, card: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.encoder, self.hypernetwork = encoder, hypernetwork
        self.card = card or {}

    @property
    def layout(self) -> LoraLayout:
        return self.hypernetwork.layout

    @property
    def device(self) -> torch.device:
        return self.hypernetwork.queries.device

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
        weights: LoraWeights = self.hypernetwork(self.features(photos))
        strength = float(self.card.get("strength", 1.0))
        return weights * strength if strength != 1 else weights

    @torch.no_grad()
    def features(self, photos: Tensor) -> ImageFeatures:
        """The encoder is frozen everywhere: its features never carry gradients."""
        return self.encoder(photos)

    def _save_pretrained(self, save_directory: Path) -> None:
        config = {"encoder": self.encoder.config, "hypernetwork": self.hypernetwork.config, "card": self.card}
        (save_directory / "config.json").write_text(json.dumps(config, indent=1))
        (save_directory / "layout.json").write_text(json.dumps(self.layout.to_dict()))
        state = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        save_file(state, save_directory / "model.safetensors", {"format": "pt", "layout": self.layout.fingerprint})

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub: Any) -> "ImageToLora":  # type: ignore[override]
        """A model from a folder or the hub; ``base`` (a ``Base``) spares a model that looks through its base a load.

        Raises ``BadArtifact`` if it is neither folder nor hub id, or holds something else.
        """
        try:
            return super().from_pretrained(name, **hub)
        except (OSError, HFValidationError) as error:
            raise BadArtifact(f"model {str(name)!r} is neither a folder nor a reachable hub id") from error
        except (ValueError, RecursionError) as error:  # the mixin reads config.json too
            raise BadArtifact(f"{name} holds a damaged ImageToLora model (config.json): fetch it again") from error

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **hub: Any) -> "ImageToLora":
        folder = Path(model_id)
        if not folder.is_dir():
            keep = {k: hub[k] for k in ("revision", "cache_dir", "token", "local_files_only") if hub.get(k) is not None}
            folder = Path(snapshot_download(model_id, **keep))
        if missing := [name for name in _FILES if not (folder / name).is_file()]:
            raise BadArtifact(f"{folder} is no ImageToLora model: {', '.join(missing)} missing; give --model")
        try:
            config = json.loads((folder / "config.json").read_text())
            layout = LoraLayout.from_dict(json.loads((folder / "layout.json").read_text()))
            if (base := hub.get("base")) is not None:
                layout.require_base(base.id)
            encoder = _encoder(config, folder, base)
            model = cls(encoder, Hypernetwork(layout, **config["hypernetwork"]), config["card"])
            model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BadArtifact(f"{folder} holds a damaged ImageToLora model ({reason}): fetch it again") from error
        return model.eval().requires_grad_(False)


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
