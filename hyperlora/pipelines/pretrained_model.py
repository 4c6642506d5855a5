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

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.errors import ModelLoadError
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights

_REQUIRED_FILES = ("config.json", "layout.json", "model.safetensors")


class PretrainedModel(nn.Module, ModelHubMixin):
    """A network that makes LoRAs for ``layout``: saved, loaded and pushed as every other.

    ``card`` holds free facts (trigger word, licence, how it was trained) that travel in ``config.json``;
    ``card["strength"]`` multiplies every LoRA it makes. ``config.json`` may name, by part, a model in the folder beside
    that the part's weights are ``borrowed`` from (``share_weights``).
    """

    card: dict[str, Any]

    @property
    def layout(self) -> LoraLayout:
        raise NotImplementedError

    def to_config(self) -> dict[str, Any]:
        """What ``config.json`` says besides the card: how ``from_config`` makes the network again."""
        raise NotImplementedError

    @classmethod
    def from_config(
        cls, config: dict[str, Any], layout: LoraLayout, folder: Path, base: DiffusionBase | None
    ) -> Self:
        """The untrained network of a configuration; ``folder`` is where it lies."""
        raise NotImplementedError

    def load_sidecars(self, *folders: Path) -> None:
        """Read what else lies in the model's folder, or in those of the models it borrows from, once its weights are
        there."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def apply_strength(self, weights: LoraWeights) -> LoraWeights:
        """``weights`` at the strength that the card tells."""
        strength = float(self.card.get("strength", 1.0))
        return weights * strength if strength != 1 else weights

    def _save_pretrained(self, save_directory: Path) -> None:
        (save_directory / "config.json").write_text(
            json.dumps(self.to_config() | {"card": self.card}, indent=1)
        )
        (save_directory / "layout.json").write_text(json.dumps(self.layout.to_dict()))
        state_dict = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        save_file(
            state_dict,
            save_directory / "model.safetensors",
            {"format": "pt", "layout": self.layout.fingerprint},
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:  # type: ignore[override]
        """A model from a folder or the hub; ``base`` (a ``DiffusionBase``) spares a model that looks through its base a load.

        Raises ``ModelLoadError`` if it is neither folder nor hub id, or holds something else.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (OSError, HFValidationError) as error:
            raise ModelLoadError(
                f"model {str(pretrained_model_name_or_path)!r} is neither a folder nor a reachable hub id"
            ) from error
        except (ValueError, RecursionError) as error:  # the mixin reads config.json too
            raise ModelLoadError(
                f"{pretrained_model_name_or_path} holds a damaged {cls.__name__} model (config.json): fetch it again"
            ) from error

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> Self:
        folder = Path(model_id)
        if not folder.is_dir():
            download_kwargs = {
                k: kwargs[k]
                for k in ("revision", "cache_dir", "token", "local_files_only")
                if kwargs.get(k) is not None
            }
            folder = Path(snapshot_download(model_id, **download_kwargs))
        if missing := [name for name in _REQUIRED_FILES if not (folder / name).is_file()]:
            raise ModelLoadError(
                f"{folder} is no {cls.__name__} model: {', '.join(missing)} missing; give --model"
            )
        try:
            config = json.loads((folder / "config.json").read_text())
            layout = _read_layout(folder)
            if (base := kwargs.get("base")) is not None:
                layout.check_base(base.id)
            model = cls.from_config(config, layout, folder, base)
            model.card = config["card"]
            model.load_state_dict(
                {k: v.float() for k, v in _load_state_dict(folder, config).items()}
            )
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RuntimeError,
            SafetensorError,
        ) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelLoadError(
                f"{folder} holds a damaged {cls.__name__} model ({reason}): fetch it again"
            ) from error
        model.load_sidecars(folder, *_resolve_weight_sources(folder, config).values())
        return model.eval().requires_grad_(False)


def _read_layout(folder: Path) -> LoraLayout:
    return LoraLayout.from_dict(json.loads((folder / "layout.json").read_text()))


def _resolve_weight_sources(folder: Path, config: dict[str, Any]) -> dict[str, Path]:
    """The folder that each borrowed part lies in."""
    return {
        component: folder.parent / Path(source_name).name
        for component, source_name in config.get("borrowed", {}).items()
    }


def _load_state_dict(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in ``folder`` and those it borrows."""
    state_dict = load_file(folder / "model.safetensors")
    for component, source_dir in _resolve_weight_sources(folder, config).items():
        if not (source_dir / "model.safetensors").is_file():
            raise ModelLoadError(
                f"{folder} borrows its {component} from {source_dir}, which is not there: fetch that model too"
            )
        state_dict |= _load_component(source_dir, component)
    return state_dict


def _load_component(folder: Path, component: str) -> dict[str, Tensor]:
    return {
        k: v
        for k, v in load_file(folder / "model.safetensors").items()
        if k.startswith(f"{component}.")
    }
