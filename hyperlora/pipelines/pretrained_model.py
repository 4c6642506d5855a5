"""``PretrainedModel``: a released network in a folder or on the hub.

The folder holds ``config.json``, ``layout.json`` and ``model.safetensors``.
"""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Final, Self

import huggingface_hub
import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hyperlora.compute import ComputeConfig, is_out_of_memory
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.errors import InvalidArgumentError, ModelLoadError, format_reason
from hyperlora.hub_connection import require_cache_if_offline
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.model_card import ModelCard
from hyperlora.pipelines.readme import GENERATED_MARK, make_readme
from hyperlora.pipelines.state_dict_keys import rename_state_dict_keys
from hyperlora.pretrained import check_bundle

CLASS_NAME_KEY: Final = "_class_name"
"""The key of ``config.json`` with the name of the pipeline's class, as in diffusers."""
_REQUIRED_FILES: Final = ("config.json", "layout.json", "model.safetensors")
_DOWNLOAD_OPTIONS: Final = ("revision", "cache_dir", "token", "local_files_only")


class PretrainedModel(nn.Module, ModelHubMixin, ABC):
    """A network that generates or encodes LoRAs of one layout, with saving, loading and pushing.

    ``config.json`` holds the class name, the arguments of the network and the model card. Its key
    ``shared_weights`` names, by component, a model in the folder beside that holds the component's
    weights (``data_builder share-weights``).

    Attributes:
        card: License, trigger phrase and recommended settings.
        readme: ``README.md`` of the folder, which ``push_to_hub`` uploads; empty for one that
            follows from the model alone.
    """

    card: ModelCard
    readme: str = ""

    @property
    @abstractmethod
    def layout(self) -> LoraLayout:
        """The layout of the LoRAs."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Return what ``from_config`` needs to build the network again, in types that JSON has."""

    @classmethod
    @abstractmethod
    def from_config(
        cls, config: dict[str, Any], layout: LoraLayout, folder: Path, base: DiffusionBase | None
    ) -> Self:
        """Build the network with random weights.

        Args:
            config: The content of ``config.json``.
            layout: The layout of the LoRAs.
            folder: The model's folder, where the config's relative paths begin.
            base: The base, for a network that encodes images with it.

        Returns:
            The network.
        """

    @classmethod
    def load_encoder_base(
        cls, config: dict[str, Any], folder: Path, compute: ComputeConfig | None = None
    ) -> DiffusionBase | None:
        """Load the base with which the model encodes images.

        Args:
            config: The content of ``config.json``.
            folder: The model's folder, where the config's relative paths begin.
            compute: Device and precision of the base.

        Returns:
            The base; None for a model that has an encoder of its own.
        """
        return None

    def load_sidecars(self, *folders: Path) -> None:
        """Read the optional files of the model, once its weights are loaded.

        Args:
            folders: The model's folder, then those of the models it shares weights with.
        """

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    def apply_strength(self, weights: LoraWeights) -> LoraWeights:
        """Scale generated LoRAs by the strength of the model card."""
        return weights * self.card.strength if self.card.strength != 1 else weights

    def generate_model_card(self, *args: Any, **kwargs: Any) -> huggingface_hub.ModelCard:
        """Make the ``README.md`` that ``save_pretrained`` and ``push_to_hub`` write.

        Args:
            *args: Not used.
            **kwargs: Not used.

        Returns:
            ``readme``, or the facts that the model itself holds.
        """
        return huggingface_hub.ModelCard(self.readme or make_readme(self))

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the three files; weights in float16. A generated README is written anew."""
        readme_path = save_directory / "README.md"
        if readme_path.is_file() and GENERATED_MARK in readme_path.read_text(encoding="utf-8"):
            readme_path.unlink()
        config = {CLASS_NAME_KEY: type(self).__name__, **self.to_config()}
        (save_directory / "config.json").write_text(
            json.dumps(config | {"card": self.card.to_dict()}, indent=1)
        )
        (save_directory / "layout.json").write_text(json.dumps(self.layout.to_dict()))
        state_dict = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        save_file(
            state_dict,
            save_directory / "model.safetensors",
            {"format": "pt", "layout": self.layout.fingerprint},
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a model from a folder or the hub, frozen and in evaluation mode.

        Args:
            pretrained_model_name_or_path: The folder or the hub id.
            **kwargs: ``base``, a ``DiffusionBase`` that spares a second load of it; ``compute``, a
                ``ComputeConfig`` with the device of the model; and what
                ``ModelHubMixin.from_pretrained`` takes.

        Returns:
            The model in float32, by default on the CPU.

        Raises:
            ModelLoadError: There is no such folder or hub id, or it holds another class of model
                or damaged files.
            LayoutMismatchError: The model is for another base than ``base``.
        """
        check_bundle(pretrained_model_name_or_path)
        if not Path(pretrained_model_name_or_path).exists():
            require_cache_if_offline()
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (OSError, HFValidationError) as error:
            raise ModelLoadError(
                f"model {str(pretrained_model_name_or_path)!r} is neither a folder nor a reachable "
                "hub id"
            ) from error
        except (ValueError, RecursionError) as error:  # the mixin reads config.json too
            raise ModelLoadError(
                f"{pretrained_model_name_or_path} holds a damaged {cls.__name__} model "
                "(config.json): fetch it again"
            ) from error

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> Self:
        folder = Path(model_id)
        if not folder.is_dir():
            download_kwargs = {k: v for k in _DOWNLOAD_OPTIONS if (v := kwargs.get(k)) is not None}
            folder = Path(snapshot_download(model_id, **download_kwargs))
        if missing := [name for name in _REQUIRED_FILES if not (folder / name).is_file()]:
            raise ModelLoadError(
                f"{folder} is no {cls.__name__} model: {', '.join(missing)} missing; give --model"
            )
        try:
            config = json.loads((folder / "config.json").read_text())
            cls._check_class_name(config, folder)
            layout = read_layout(folder)
            if (base := kwargs.get("base")) is not None:
                layout.check_base(base.id)
            compute = kwargs.get("compute")
            base = base or cls.load_encoder_base(config, folder, compute)
            model = cls.from_config(config, layout, folder, base)
            model.card = ModelCard.from_dict(config["card"])
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
            InvalidArgumentError,
        ) as error:
            if is_out_of_memory(error):  # a RuntimeError, too, and no damage
                raise
            raise ModelLoadError(
                f"{folder} holds a damaged {cls.__name__} model ({format_reason(error)}): "
                "fetch it again"
            ) from error
        model.load_sidecars(folder, *_resolve_weight_sources(folder, config).values())
        if (folder / "README.md").is_file():
            model.readme = (folder / "README.md").read_text(encoding="utf-8")
        return model.to(compute.torch_device if compute else None).eval().requires_grad_(False)

    @classmethod
    def _check_class_name(cls, config: dict[str, Any], folder: Path) -> None:
        class_name = config.get(CLASS_NAME_KEY, cls.__name__)
        if class_name not in (parent.__name__ for parent in cls.__mro__):
            raise ModelLoadError(
                f"{folder} holds a model of the class {class_name}, {cls.__name__} was expected: "
                "give another --model"
            )


def read_layout(folder: Path) -> LoraLayout:
    """Read ``layout.json`` of a released model."""
    return LoraLayout.from_dict(json.loads((folder / "layout.json").read_text()))


def load_component(folder: Path, component: str) -> dict[str, Tensor]:
    """Load the weights of one component of a released model.

    Args:
        folder: The model's folder.
        component: The first part of the keys, e.g. ``encoder``.

    Returns:
        The weights by their keys, which keep the component's name.
    """
    state_dict = rename_state_dict_keys(load_file(folder / "model.safetensors"))
    return {k: v for k, v in state_dict.items() if k.startswith(f"{component}.")}


def _resolve_weight_sources(folder: Path, config: dict[str, Any]) -> dict[str, Path]:
    """Return the folder that holds the weights of each shared component."""
    return {
        component: folder.parent / Path(source_name).name
        for component, source_name in config.get("shared_weights", {}).items()
    }


def _load_state_dict(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Load the weights of a model, those of its shared components from the models beside."""
    state_dict = rename_state_dict_keys(load_file(folder / "model.safetensors"))
    for component, source_dir in _resolve_weight_sources(folder, config).items():
        if not (source_dir / "model.safetensors").is_file():
            raise ModelLoadError(
                f"{folder} shares its {component} with {source_dir}, which is not there: "
                "fetch that model too"
            )
        state_dict |= load_component(source_dir, component)
    return state_dict
