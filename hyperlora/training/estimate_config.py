"""``hyperlora train estimate``: what a configuration takes, computed without weights or photos."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn

from hyperlora.diffusion.target_modules import make_layout
from hyperlora.encoders.attribute_classifier import load_image_encoder
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import LoraLayout
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.models.pair_hypernetwork import PairHypernetwork
from hyperlora.training.estimate import BatchSize, TrainingParts, estimate_memory
from hyperlora.training.known_bases import make_meta_base
from hyperlora.training.memory import TrainerOptions, TrainingMemory
from hyperlora.training.modules.hypernetwork import UNET_ENCODER, HypernetworkTraining
from hyperlora.training.modules.pair_hypernetwork import (
    PairHypernetworkTraining,
    load_vocabulary,
)

_CLASSES: Final = {
    f"{training.__module__}.{training.__name__}": training
    for training in (HypernetworkTraining, PairHypernetworkTraining)
}


def estimate_config(config: Mapping[str, Any]) -> TrainingMemory:
    """Estimate the memory of the training of a hypernetwork on each device.

    Args:
        config: With ``model``, ``data`` and ``trainer``, as LightningCLI parses it.

    Returns:
        The table.

    Raises:
        InvalidArgumentError: It trains something else, or the size of its base is not known.
    """
    class_path = config["model"]["class_path"]
    if class_path not in _CLASSES:
        raise InvalidArgumentError(
            f"the memory of {class_path} cannot be estimated: only that of {', '.join(_CLASSES)}"
        )
    model, trainer = config["model"]["init_args"], config["trainer"]
    if model["encoder"] == UNET_ENCODER:
        raise InvalidArgumentError(
            "the memory of a training whose encoder is the UNet cannot be estimated: "
            "begin it, and it prints the same table"
        )
    if model.get("text_encoders"):
        raise InvalidArgumentError(
            "the memory of LoRAs of text encoders cannot be estimated without the base: begin the "
            "training, and it prints the same table"
        )
    if model["start_from"]:
        raise InvalidArgumentError(
            f"the network of {model['start_from']!r} decides the memory: begin the training, and "
            "it prints the same table"
        )
    devices = str(trainer["devices"])  # a number, "auto" or a list
    num_devices = int(devices) if devices.isdecimal() else 1
    base_options = model["base_options"] or {}
    left_out = {name for name, value in base_options.items() if value is None}
    base = make_meta_base(
        model["base"],
        base_options.get("dtype", "float32"),
        num_devices if model["shard_base"] else 1,
    )
    layout = make_layout(
        {base.family.denoiser_name: base.denoiser}, model["preset"], model["rank"], model["base"]
    )
    with torch.device("meta"):
        encoder = load_image_encoder(
            model["encoder"], {**(model["encoder_options"] or {}), "pretrained": False}
        )
        network = _make_network(model, layout, encoder.width)
    encoder.requires_grad_(not model.get("freeze_encoder", True))
    callbacks = [str(callback["class_path"]) for callback in trainer["callbacks"] or []]
    return estimate_memory(
        TrainingParts(
            base_rows=[row for row in base.rows if row.name.split(" ")[0] not in left_out],
            family=base.family,
            denoiser=base.denoiser,
            encoder=encoder,
            network=nn.ModuleList([encoder, network]),
            layout=layout,
            batch=BatchSize.from_config(config["data"]["init_args"], model, base.family.resolution),
            use_checkpointing=model["gradient_checkpointing"],
            options=TrainerOptions(
                has_average=any(path.endswith("WeightAveraging") for path in callbacks),
                is_mixed=str(trainer["precision"]).endswith("-mixed"),
                num_devices=num_devices,
            ),
        )
    )


def _make_network(model: Mapping[str, Any], layout: LoraLayout, encoder_width: int) -> nn.Module:
    """Make the network in training, on the current device."""
    if "hypernetwork" in model:
        return Hypernetwork(layout, encoder_width, **(model["hypernetwork"] or {}))
    options = load_vocabulary(model["network"] or {})
    return PairHypernetwork(layout, encoder_width, **options)
