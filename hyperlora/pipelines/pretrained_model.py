"""What a released network is on disk and on the hub: ``config.json``, ``layout.json``, ``model.safetensors``."""

import json
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hyperlora.diffusion.diffusion_base import Base
from hyperlora.errors import BadArtifact
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights

_FILES = ("config.json", "layout.json", "model.safetensors")


class ReleasedModel(nn.Module, ModelHubMixin):
    """A network that makes LoRAs for ``layout``: saved, loaded and pushed as every other.

    ``card`` holds free facts (trigger word, licence, how it was trained) that travel in ``config.json``;
    ``card["strength"]`` multiplies every LoRA it makes. ``config.json`` may name, by part, a model in the folder beside
    that the part's weights are ``borrowed`` from (``borrow``).
    """

    card: dict[str, Any]

    @property
    def layout(self) -> LoraLayout:
        raise NotImplementedError

    def parts(self) -> dict[str, Any]:
        """What ``config.json`` says besides the card: how ``built`` makes the network again."""
        raise NotImplementedError

    @classmethod
    def built(cls, config: dict[str, Any], layout: LoraLayout, folder: Path, base: Base | None) -> Self:
        """The untrained network of a configuration; ``folder`` is where it lies."""
        raise NotImplementedError

    def opened(self, *folders: Path) -> None:
        """Read what else lies in the model's folder, or in those of the models it borrows from, once its weights are
        there."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def strong(self, weights: LoraWeights) -> LoraWeights:
        """``weights`` at the strength that the card tells."""
        strength = float(self.card.get("strength", 1.0))
        return weights * strength if strength != 1 else weights

    def _save_pretrained(self, save_directory: Path) -> None:
        (save_directory / "config.json").write_text(json.dumps(self.parts() | {"card": self.card}, indent=1))
        (save_directory / "layout.json").write_text(json.dumps(self.layout.to_dict()))
        state = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        save_file(state, save_directory / "model.safetensors", {"format": "pt", "layout": self.layout.fingerprint})

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub: Any) -> Self:  # type: ignore[override]
        """A model from a folder or the hub; ``base`` (a ``Base``) spares a model that looks through its base a load.

        Raises ``BadArtifact`` if it is neither folder nor hub id, or holds something else.
        """
        try:
            return super().from_pretrained(name, **hub)
        except (OSError, HFValidationError) as error:
            raise BadArtifact(f"model {str(name)!r} is neither a folder nor a reachable hub id") from error
        except (ValueError, RecursionError) as error:  # the mixin reads config.json too
            raise BadArtifact(f"{name} holds a damaged {cls.__name__} model (config.json): fetch it again") from error

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **hub: Any) -> Self:
        folder = Path(model_id)
        if not folder.is_dir():
            keep = {k: hub[k] for k in ("revision", "cache_dir", "token", "local_files_only") if hub.get(k) is not None}
            folder = Path(snapshot_download(model_id, **keep))
        if missing := [name for name in _FILES if not (folder / name).is_file()]:
            raise BadArtifact(f"{folder} is no {cls.__name__} model: {', '.join(missing)} missing; give --model")
        try:
            config = json.loads((folder / "config.json").read_text())
            layout = _layout(folder)
            if (base := hub.get("base")) is not None:
                layout.require_base(base.id)
            model = cls.built(config, layout, folder, base)
            model.card = config["card"]
            model.load_state_dict({k: v.float() for k, v in _state(folder, config).items()})
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BadArtifact(f"{folder} holds a damaged {cls.__name__} model ({reason}): fetch it again") from error
        model.opened(folder, *_lenders(folder, config).values())
        return model.eval().requires_grad_(False)


def _layout(folder: Path) -> LoraLayout:
    return LoraLayout.from_dict(json.loads((folder / "layout.json").read_text()))


def _lenders(folder: Path, config: dict[str, Any]) -> dict[str, Path]:
    """The folder that each borrowed part lies in."""
    return {part: folder.parent / Path(lender).name for part, lender in config.get("borrowed", {}).items()}


def _state(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in ``folder`` and those it borrows."""
    state = load_file(folder / "model.safetensors")
    for part, beside in _lenders(folder, config).items():
        if not (beside / "model.safetensors").is_file():
            raise BadArtifact(f"{folder} borrows its {part} from {beside}, which is not there: fetch that model too")
        state |= _part(beside, part)
    return state


def _part(folder: Path, part: str) -> dict[str, Tensor]:
    return {k: v for k, v in load_file(folder / "model.safetensors").items() if k.startswith(f"{part}.")}
