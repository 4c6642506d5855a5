"""Memory of the trainings on LoRAs: the autoencoder, and the diffusion over its latents."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.encoders.attribute_classifier import load_image_encoder
from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.errors import InvalidArgumentError, InvalidLoraFileError
from hyperlora.features import ImageFeatures
from hyperlora.lora.layout import LoraLayout
from hyperlora.models.image_feature_mixer import MixedImageFeatures
from hyperlora.models.lora_autoencoder import LoraAutoencoder
from hyperlora.models.lora_dit import LoraDiT
from hyperlora.pipelines.lora_codec import LoraCodec
from hyperlora.pipelines.lora_diffusion import FACE_EMBED_DIM
from hyperlora.pipelines.pretrained_model import read_layout
from hyperlora.training.activations import FlashAttentionMode, StorageCounter
from hyperlora.training.known_bases import make_meta_base
from hyperlora.training.memory import (
    MemoryRow,
    TrainerOptions,
    TrainingMemory,
    describe_lora,
    make_frozen_row,
    make_network_rows,
)

PLAN_FILE: Final = "plan.json"
"""A build's plan, which names base, modules and rank before any LoRA is fitted."""


def estimate_autoencoder(config: Mapping[str, Any], options: TrainerOptions) -> TrainingMemory:
    """Estimate the memory of the training of a LoRA autoencoder.

    Args:
        config: With ``model`` and ``data``, as LightningCLI parses it. Its dataset may be a plan.
        options: Of the trainer.

    Returns:
        The table.

    Raises:
        InvalidArgumentError: The dataset is neither there nor planned.
    """
    model, batch_size = config["model"]["init_args"], config["data"]["init_args"]["batch_size"]
    layout = read_dataset_layout(Path(model["folder"]))
    with torch.device("meta"):
        network = LoraAutoencoder(layout, **(model["autoencoder"] or {}))
        rows = torch.empty(batch_size, layout.numel)
    activation_bytes = _count_saved_bytes(network, lambda: network(rows))
    return TrainingMemory(
        [
            *make_network_rows(network, options),
            # as they are, normalized, reconstructed, and the gradient of the last
            MemoryRow("LoRAs of a batch", None, 4 * 4 * rows.numel(), "activations"),
            MemoryRow("activations (estimate)", None, activation_bytes, "activations"),
        ],
        f"{describe_lora(layout)}; {network.num_tokens * network.latent_width:,} latents, "
        f"compression {network.compression:,.0f}",
        use_checkpointing=True,
        is_half=True,
    )


def estimate_lora_diffusion(config: Mapping[str, Any], options: TrainerOptions) -> TrainingMemory:
    """Estimate the memory of the training of a diffusion over LoRAs.

    Args:
        config: With ``model`` and ``data``, as LightningCLI parses it.
        options: Of the trainer.

    Returns:
        The table.

    Raises:
        InvalidArgumentError: There is no such codec.
    """
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    folder = Path(model["codec"])
    if not (folder / "config.json").is_file():
        raise InvalidArgumentError(
            f"the codec {model['codec']!r} decides the memory, and there is no such folder: "
            "train or fetch it first"
        )
    codec_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        codec = LoraCodec.from_config(codec_config, read_layout(folder), folder, None)
        encoder = load_image_encoder(
            model["encoder"], {**(model["encoder_options"] or {}), "pretrained": False}
        )
        mixture_options = {"mode": "gate" if model["face_pack"] else "image"}
        mixture = MixedImageFeatures(
            FACE_EMBED_DIM, encoder.width, **mixture_options | (model["mixture"] or {})
        )
        denoiser = LoraDiT(*codec.latent_shape, mixture.width, **(model["denoiser"] or {}))
        network = nn.ModuleList([mixture, denoiser])
    run = _make_diffusion_step(codec, encoder, mixture, denoiser, data)
    return TrainingMemory(
        [
            make_frozen_row("LoRA codec", codec, "base"),
            make_frozen_row("image encoder", encoder, "encoder"),
            *make_network_rows(network, options),
            MemoryRow(
                "activations (estimate)", None, _count_saved_bytes(network, run), "activations"
            ),
        ],
        describe_lora(codec.layout),
        use_checkpointing=True,
        is_half=True,
    )


def read_dataset_layout(folder: Path) -> LoraLayout:
    """Read the layout of a dataset's LoRAs, or make that of a plan.

    Args:
        folder: Build or pack.

    Returns:
        The layout.

    Raises:
        InvalidArgumentError: There is neither.
    """
    try:
        return LoraDataset(folder).layout
    except InvalidLoraFileError as error:
        plan_path = folder / PLAN_FILE
        if not plan_path.is_file():
            raise InvalidArgumentError(
                f"{str(folder)!r} holds neither LoRAs nor a plan of them, which decide the "
                "memory: make one with data-builder plan"
            ) from error
    recipe = json.loads(plan_path.read_text(encoding="utf-8"))["recipe"]
    base = make_meta_base(recipe["base"])
    components: dict[str, nn.Module] = {base.family.denoiser_name: base.denoiser}
    if recipe.get("text_encoders"):
        components |= base.text_encoders
    preset = "attention+conv" if recipe["parametrization"] == "locon" else recipe["preset"]
    return make_layout(components, preset, recipe["rank"], recipe["base"])


def _make_diffusion_step(
    codec: LoraCodec,
    encoder: TimmEncoder,
    mixture: MixedImageFeatures,
    denoiser: LoraDiT,
    data: Mapping[str, Any],
) -> Callable[[], object]:
    """Make a function that runs the networks on a batch without numbers."""
    batch_size, num_views = data["batch_size"], data["num_views"]
    with torch.device("meta"), torch.no_grad():
        num_tokens = encoder(torch.empty(1, 1, 3, encoder.image_size, encoder.image_size))
        faces = torch.empty(batch_size, num_views, 1, FACE_EMBED_DIM)
        images = torch.empty(batch_size, num_views, *num_tokens.tokens.shape[2:])
        latents, times = torch.empty(batch_size, *codec.latent_shape), torch.empty(batch_size)

    def run() -> Tensor:
        """Run mixture and denoiser."""
        with torch.device("meta"):  # the frequencies of time embeddings
            condition = mixture(ImageFeatures(faces), ImageFeatures(images))
            return denoiser(latents, times, condition)

    return run


def _count_saved_bytes(network: nn.Module, run: Callable[[], object]) -> int:
    """Count the bytes that the backward pass of a function needs, in float32."""
    counter = StorageCounter([*network.parameters(), *network.buffers()])
    with FlashAttentionMode(), saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        run()
    return counter.num_bytes
