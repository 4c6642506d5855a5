"""Nodes for ComfyUI: a LoRA from images or from before/after pairs; apply a LoRA; save a LoRA.

A LoRA travels between nodes as the bytes of a ``.safetensors`` file, of the type HYPERLORA.
The file has the key names of ``auto``, all of which ComfyUI reads, but for Lumina 2: there it has
ComfyUI's own.
"""

import io
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypedDict, TypeVar

import torch
from PIL import Image

if TYPE_CHECKING:
    from hyperlora.lora.io.lora import Lora
    from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase
    from hyperlora.pipelines.pair_to_lora import PairToLora as PairToLoraPipeline

CATEGORY = "hyperlora"
API_KEY_ENV = "HYPERLORA_API_KEY"
"""Environment variable of the server's API key: ComfyUI writes node inputs into every image."""

InputSpec = tuple[str] | tuple[str, dict[str, object]]
"""A ComfyUI type, and perhaps its options."""
InputTypes = dict[str, dict[str, InputSpec]]
"""Inputs by group (required, optional) and name."""
ModelT = TypeVar("ModelT")
ClipT = TypeVar("ClipT")


class UiOutput(TypedDict):
    """What an output node shows in ComfyUI."""

    ui: dict[str, list[str]]


class ImagesToLora:
    """Generate a LoRA from images of one subject."""

    CATEGORY = CATEGORY
    FUNCTION = "generate_lora"
    RETURN_TYPES = ("HYPERLORA",)
    RETURN_NAMES = ("lora",)
    DESCRIPTION = "A LoRA from one or several images of a subject, in one forward pass."

    @classmethod
    def INPUT_TYPES(cls) -> InputTypes:  # noqa: N802
        """Describe the inputs of the node."""
        model_tooltip = "Folder or hub id; empty: the bundled avatars model."
        server_tooltip = "http://... of a hyperlora server; empty: this process."
        rank_options = {"default": 0, "min": 0, "max": 128, "tooltip": "0: the model's own."}
        return {
            "required": {"images": ("IMAGE",)},
            "optional": {
                "model": ("STRING", {"default": "", "tooltip": model_tooltip}),
                "server": ("STRING", {"default": "", "tooltip": server_tooltip}),
                "rank": ("INT", rank_options),
            },
        }

    def generate_lora(
        self, images: torch.Tensor, model: str = "", server: str = "", rank: int = 0
    ) -> tuple[bytes]:
        """Generate a LoRA.

        Args:
            images: [n, h, w, 3] in [0, 1], all of one subject.
            model: Folder or hub id of a model from photos; empty for the bundled one.
            server: Address of a hyperlora server; empty for this process.
            rank: Rank of the LoRA; 0 for the model's own.

        Returns:
            The bytes of a ``.safetensors`` file.
        """
        photos = [_encode_png(image) for image in images]
        if server:
            return (_request_lora(server, photos, rank),)
        from hyperlora.data.images import read_image
        from hyperlora.lora.io.lora import Lora
        from hyperlora.pipelines.config import GenerationConfig
        from hyperlora.pipelines.generate import generate_loras
        from hyperlora.pipelines.photo_model import SubjectPhotos

        pipeline = _load_image_to_lora(model)
        subject = SubjectPhotos.from_images([read_image(photo) for photo in photos], pipeline)
        config = GenerationConfig(
            rank=rank or None,
        )
        weights = generate_loras(pipeline, [subject], config)[0]
        lora = Lora(weights, pipeline.make_metadata("LoRA", photos))
        return (_serialize_lora(lora),)


class PairToLora:
    """Generate the LoRA of the edit between images before and after it."""

    CATEGORY = CATEGORY
    FUNCTION = "generate_lora"
    RETURN_TYPES = ("HYPERLORA",)
    DESCRIPTION = (
        "A LoRA of the edit between an image before and after it, for a model that edits images."
    )

    @classmethod
    def INPUT_TYPES(cls) -> InputTypes:  # noqa: N802
        """Describe the inputs of the node."""
        model_tooltip = "Folder or hub id; empty: the bundled model."
        server_tooltip = "http://... of a hyperlora server; empty: this process."
        return {
            "required": {"before": ("IMAGE",), "after": ("IMAGE",)},
            "optional": {
                "model": ("STRING", {"default": "", "tooltip": model_tooltip}),
                "server": ("STRING", {"default": "", "tooltip": server_tooltip}),
            },
        }

    def generate_lora(
        self, before: torch.Tensor, after: torch.Tensor, model: str = "", server: str = ""
    ) -> tuple[bytes]:
        """Generate the LoRA of an edit.

        Args:
            before: [n, h, w, 3] in [0, 1]; several images are several pairs of one edit.
            after: The same images after the edit, of the same size.
            model: Folder or hub id of a model from pairs; empty for the bundled one.
            server: Address of a hyperlora server; empty for this process.

        Returns:
            The bytes of a ``.safetensors`` file.

        Raises:
            ValueError: If the sizes differ.
        """
        if before.shape != after.shape:
            raise ValueError(
                f"before is {list(before.shape)}, after {list(after.shape)}: "
                "the same size is expected"
            )
        pairs = [(_encode_png(a), _encode_png(b)) for a, b in zip(before, after, strict=True)]
        if server:
            from hyperlora import Client

            with Client(server, os.environ.get(API_KEY_ENV)) as client:
                return (client.create_edit_lora(pairs),)
        from hyperlora.lora.io.lora import Lora

        pipeline = _load_pair_to_lora(model)
        metadata = pipeline.make_metadata("edit", pairs)
        return (_serialize_lora(Lora(pipeline(pairs).weights, metadata)),)


class ApplyLora:
    """Apply a LoRA to a model and, if given, to its text encoder."""

    CATEGORY = CATEGORY
    FUNCTION = "apply_lora"
    RETURN_TYPES = ("MODEL", "CLIP")
    DESCRIPTION = "The model with the LoRA added."

    @classmethod
    def INPUT_TYPES(cls) -> InputTypes:  # noqa: N802
        """Describe the inputs of the node."""
        strength_options: dict[str, object] = {
            "default": 1.0,
            "min": -10.0,
            "max": 10.0,
            "step": 0.05,
        }
        return {
            "required": {
                "model": ("MODEL",),
                "lora": ("HYPERLORA",),
                "strength": ("FLOAT", strength_options),
            },
            "optional": {"clip": ("CLIP",)},
        }

    def apply_lora(
        self, model: ModelT, lora: bytes, strength: float, clip: ClipT | None = None
    ) -> tuple[ModelT, ClipT | None]:
        """Apply a LoRA with ComfyUI's own loader, which warns of unknown keys.

        Args:
            model: A model of ComfyUI.
            lora: The bytes of a ``.safetensors`` file.
            strength: Factor of the LoRA.
            clip: The text encoder of the model.

        Returns:
            Patched copies of the model and the text encoder.
        """
        import comfy.sd
        from safetensors.torch import load

        state_dict = load(lora)
        patched_model, patched_clip = comfy.sd.load_lora_for_models(
            model, clip, state_dict, strength, strength
        )
        return patched_model, patched_clip


class SaveLora:
    """Save a LoRA in ComfyUI's folder of LoRAs, where its loader lists it."""

    CATEGORY = CATEGORY
    FUNCTION = "save_lora"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ()
    OUTPUT_NODE = True
    DESCRIPTION = "Writes the LoRA into the folder of LoRAs."

    @classmethod
    def INPUT_TYPES(cls) -> InputTypes:  # noqa: N802
        """Describe the inputs of the node."""
        return {"required": {"lora": ("HYPERLORA",), "name": ("STRING", {"default": "hyperlora"})}}

    def save_lora(self, lora: bytes, name: str) -> UiOutput:
        """Save a LoRA; a number is added to the name rather than another file replaced.

        Args:
            lora: The bytes of a ``.safetensors`` file.
            name: Name of the file, without suffix.

        Returns:
            The name of the file, for ComfyUI to show.
        """
        import folder_paths

        folder = Path(folder_paths.get_folder_paths("loras")[0])
        folder.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"[^\w .-]|^\.+", "_", name).strip(" .") or "hyperlora"
        suffix, path = 1, folder / f"{stem}.safetensors"
        while True:
            try:
                with path.open("xb") as file:
                    file.write(lora)
                return {"ui": {"text": [path.name]}}
            except FileExistsError:
                suffix += 1
                path = folder / f"{stem}-{suffix}.safetensors"


NODE_CLASS_MAPPINGS = {
    "HyperloraImagesToLora": ImagesToLora,
    "HyperloraPairToLora": PairToLora,
    "HyperloraApply": ApplyLora,
    "HyperloraSave": SaveLora,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "HyperloraImagesToLora": "Images to LoRA",
    "HyperloraPairToLora": "Pair to LoRA",
    "HyperloraApply": "Apply LoRA (hyperlora)",
    "HyperloraSave": "Save LoRA (hyperlora)",
}


def _request_lora(server: str, photos: list[bytes], rank: int) -> bytes:
    """Ask a server for the LoRA of photos, in the format that ComfyUI reads for its base."""
    from hyperlora import Client

    with Client(server, os.environ.get(API_KEY_ENV)) as client:
        model_info = client.list_models()[0]
        is_unread = model_info["lora_format"] == "diffusers" and (
            "ComfyUI" not in model_info["lora_readers"]
        )
        rank_option = {"rank": rank} if rank else {}
        lora_format = "comfyui" if is_unread else "auto"
        return client.create_lora(photos, format=lora_format, **rank_option)


def _serialize_lora(lora: "Lora") -> bytes:
    """Write a LoRA with key names that ComfyUI reads: those of ``auto``, else its own."""
    from hyperlora.lora.io.formats import READERS, detect_family, list_readers, resolve_format

    layout, architecture = lora.weights.layout, lora.metadata.architecture
    readers = list_readers(layout, resolve_format("auto", layout, architecture), architecture)
    own_readers = READERS.get(detect_family(layout, architecture), {}).get("comfyui", ())
    is_unread = "ComfyUI" not in readers and "ComfyUI" in own_readers
    return lora.serialize(format="comfyui" if is_unread else "auto")


@lru_cache(maxsize=1)
def _load_image_to_lora(name: str) -> "ImageToLoraBase":
    from hyperlora import ImageToLora, pretrained

    return ImageToLora.from_pretrained(name or pretrained.IMAGE_TO_LORA_DIR).to(_find_device())


@lru_cache(maxsize=1)
def _load_pair_to_lora(name: str) -> "PairToLoraPipeline":
    from hyperlora import PairToLora, pretrained

    return PairToLora.from_pretrained(name or pretrained.PAIR_TO_LORA_DIR).to(_find_device())


def _find_device() -> torch.device:
    """Return the device that ComfyUI computes on; outside of ComfyUI the accelerator or the CPU."""
    try:
        from comfy.model_management import get_torch_device
    except ImportError:
        from hyperlora.compute import ComputeConfig

        return ComputeConfig().torch_device
    device: torch.device = get_torch_device()
    return device


def _encode_png(image: torch.Tensor) -> bytes:
    """Encode [h, w, 3 or 4] in [0, 1] as a PNG file; alpha is dropped."""
    pixels = image[..., :3].clamp(0, 1).mul(255).round().to("cpu", torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
