"""``hyperlora train estimate``: what a configuration takes, computed without weights or photos."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from hyperlora.diffusion.target_modules import make_layout
from hyperlora.encoders.attribute_classifier import load_image_encoder
from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.errors import InvalidArgumentError
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.models.pair_hypernetwork import PairHypernetwork
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.pipelines.pretrained_model import read_layout
from hyperlora.training.estimate import BatchSize, TrainingParts, estimate_memory
from hyperlora.training.estimate_lora_models import estimate_autoencoder, estimate_lora_diffusion
from hyperlora.training.known_bases import MetaBase, make_meta_base
from hyperlora.training.memory import TrainerOptions, TrainingMemory
from hyperlora.training.modules.hypernetwork import UNET_ENCODER, HypernetworkTraining
from hyperlora.training.modules.lora_autoencoder import LoraAutoencoderTraining
from hyperlora.training.modules.lora_diffusion import LoraDiffusionTraining
from hyperlora.training.modules.pair_hypernetwork import (
    PairHypernetworkTraining,
    load_vocabulary,
)


def _get_class_path(training: type) -> str:
    return f"{training.__module__}.{training.__name__}"


_HYPERNETWORKS: Final = tuple(
    map(_get_class_path, (HypernetworkTraining, PairHypernetworkTraining))
)
_ESTIMATES: Final = {
    _get_class_path(LoraAutoencoderTraining): estimate_autoencoder,
    _get_class_path(LoraDiffusionTraining): estimate_lora_diffusion,
}
"""Of trainings on LoRAs, which need no base."""


def estimate_config(config: Mapping[str, Any]) -> TrainingMemory:
    """Estimate the memory of a training on each device.

    Args:
        config: With ``model``, ``data`` and ``trainer``, as LightningCLI parses it.

    Returns:
        The table.

    Raises:
        InvalidArgumentError: It trains something else, or the size of its base is not known.
    """
    class_path = config["model"]["class_path"]
    options = _read_trainer_options(config["trainer"])
    if class_path in _ESTIMATES:
        return _ESTIMATES[class_path](config, options)
    if class_path not in _HYPERNETWORKS:
        known = ", ".join([*_HYPERNETWORKS, *_ESTIMATES])
        raise InvalidArgumentError(
            f"the memory of {class_path} cannot be estimated: only that of {known}"
        )
    model = config["model"]["init_args"]
    if model["encoder"] == UNET_ENCODER:
        raise InvalidArgumentError(
            "the memory of a training whose encoder is the UNet cannot be estimated: "
            "begin it, and it prints the same table"
        )
    base_options = model["base_options"] or {}
    left_out = {name for name, value in base_options.items() if value is None}
    base = make_meta_base(
        model["base"],
        base_options.get("dtype", "float32"),
        options.num_devices if model["shard_base"] else 1,
    )
    text_encoders = _select_text_encoders(base, model)
    with torch.device("meta"):
        encoder, network = _make_modules(model, base, text_encoders)
    return estimate_memory(
        TrainingParts(
            base_rows=[row for row in base.rows if row.name.split(" ")[0] not in left_out],
            family=base.family,
            denoiser=base.denoiser,
            encoder=encoder,
            network=nn.ModuleList([encoder, network]),
            layout=network.layout,
            batch=BatchSize.from_config(config["data"]["init_args"], model, base.family.resolution),
            use_checkpointing=model["gradient_checkpointing"],
            options=options,
            text_encoders=text_encoders,
        )
    )


def _read_trainer_options(trainer: Mapping[str, Any]) -> TrainerOptions:
    """Read what of a trainer changes the memory."""
    callbacks = [str(callback["class_path"]) for callback in trainer["callbacks"] or []]
    return TrainerOptions(
        has_average=any(path.endswith("WeightAveraging") for path in callbacks),
        is_mixed=str(trainer["precision"]).endswith("-mixed"),
        num_devices=_count_devices(trainer),
    )


def _count_devices(trainer: Mapping[str, Any]) -> int:
    """Count the devices of all nodes; ``auto`` and -1 count as one."""
    devices = trainer["devices"]  # a number, a list of numbers, such a list as text, or auto
    if isinstance(devices, str) and "," in devices:
        devices = [number for number in devices.split(",") if number.strip()]
    if isinstance(devices, list):
        num_devices = len(devices)
    else:
        num_devices = int(devices) if str(devices).isdecimal() else 1
    return num_devices * int(trainer.get("num_nodes") or 1)


def _select_text_encoders(base: MetaBase, model: Mapping[str, Any]) -> Mapping[str, nn.Module]:
    """Return the text encoders that are adapted; {} if only the denoiser is.

    Raises:
        InvalidArgumentError: The base has none that can be.
    """
    if not model.get("text_encoders"):
        return {}
    if not base.text_encoders:
        raise InvalidArgumentError(
            f"the text encoders of {model['base']!r} take no LoRA: only those of CLIP do; "
            "set text_encoders: false"
        )
    return base.text_encoders


def _make_modules(
    model: Mapping[str, Any], base: MetaBase, text_encoders: Mapping[str, nn.Module]
) -> tuple[TimmEncoder, Hypernetwork | PairHypernetwork]:
    """Make the image encoder and the network in training, on the current device."""
    is_pair = "hypernetwork" not in model
    start = _make_start(model["start_from"], is_pair) if model["start_from"] else None
    network: Hypernetwork | PairHypernetwork
    if isinstance(start, PairToLora):  # which goes on with its own encoder
        encoder, network = start.encoder, start.network
    else:
        encoder = load_image_encoder(
            model["encoder"], {**(model["encoder_options"] or {}), "pretrained": False}
        )
        components = {base.family.denoiser_name: base.denoiser, **text_encoders}
        layout = make_layout(components, model["preset"], model["rank"], model["base"])
        if start is not None:
            network = start.hypernetwork
            network.layout.check_compatible(layout)
        elif is_pair:
            options = load_vocabulary(model["network"] or {})
            network = PairHypernetwork(layout, encoder.width, **options)
        else:
            network = Hypernetwork(layout, encoder.width, **(model["hypernetwork"] or {}))
    encoder.requires_grad_(not model.get("freeze_encoder", True))
    if isinstance(network, PairHypernetwork) and network.instruction_head is not None:
        network.instruction_head.requires_grad_(not model["freeze_instruction_head"])
    return encoder, network


def _make_start(start_from: str, is_pair: bool) -> ImageToLora | PairToLora:
    """Make the model that a training continues, without its weights.

    Raises:
        InvalidArgumentError: It is not there.
    """
    folder = Path(start_from)
    if not (folder / "config.json").is_file():
        raise InvalidArgumentError(
            f"the network of {start_from!r} decides the memory, and there is no such folder: "
            "train or fetch it first"
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model_class: type[ImageToLora | PairToLora] = PairToLora if is_pair else ImageToLora
    return model_class.from_config(config, read_layout(folder), folder, None)
