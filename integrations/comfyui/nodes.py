"""Nodes for ComfyUI: a LoRA from images or from before/after pairs; apply a LoRA; save a LoRA.

A LoRA travels between nodes as the bytes of a ``.safetensors`` file, of the type HYPERLORA.
The file has the key names of ``auto``, all of which ComfyUI reads, but for Lumina 2: there it has
ComfyUI's own.
"""

import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypedDict, TypeVar

import torch
from PIL import Image

from .models import (
    BUNDLED_MODEL,
    find_listed_model,
    list_models,
    load_pair_to_lora,
    load_photo_model,
)

if TYPE_CHECKING:
    from hyperlora.lora.io.formats import FormatChoice
    from hyperlora.lora.io.lora import Lora
    from hyperlora.lora.layout import LoraLayout

CATEGORY = "hyperlora"
API_KEY_ENV = "HYPERLORA_API_KEY"
"""Environment variable of the server's API key: ComfyUI writes node inputs into every image."""

InputSpec = tuple[str] | tuple[str | list[str], dict[str, object]]
"""A ComfyUI type or a list to choose from, and perhaps its options."""
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
    RETURN_TYPES = ("HYPERLORA", "STRING", "HYPERLORA")
    RETURN_NAMES = ("lora", "trigger", "negative_lora")
    DESCRIPTION = (
        "A LoRA from one or several images of a subject, in one forward pass; the words with "
        "which prompts must begin; and the LoRA for the negative branch of guidance."
    )

    @classmethod
    def INPUT_TYPES(cls) -> InputTypes:  # noqa: N802
        """Describe the inputs of the node."""
        model_tooltip = "Folder or hub id, also ORG/NAME:VARIANT; empty: the one in the list."
        server_tooltip = "http://... of a hyperlora server, model is a name there; empty: here."
        list_tooltip = "Networks in models/hyperlora, and those that are fetched at first use."
        encoder_tooltip = "Image encoder: folder or hub id; empty: the network's own."
        face_tooltip = "Face pack: folder or name; empty: that of models/insightface, else fetched."
        code_tooltip = "SHA-256 of a template's model.py that may run; the error without it says it"
        rank_options = {"default": 0, "min": 0, "max": 128, "tooltip": "0: the model's own."}
        return {
            "required": {"images": ("IMAGE",)},
            "optional": {
                "model": ("STRING", {"default": "", "tooltip": model_tooltip}),
                "server": ("STRING", {"default": "", "tooltip": server_tooltip}),
                "rank": ("INT", rank_options),
                # new inputs stand last: workflows store values by their order
                "listed_model": (list_models(), {"tooltip": list_tooltip}),
                "trust_remote_code": ("STRING", {"default": "", "tooltip": code_tooltip}),
                "encoder": ("STRING", {"default": "", "tooltip": encoder_tooltip}),
                "face_pack": ("STRING", {"default": "", "tooltip": face_tooltip}),
            },
        }

    def generate_lora(
        self,
        images: torch.Tensor,
        model: str = "",
        server: str = "",
        rank: int = 0,
        listed_model: str = BUNDLED_MODEL,
        trust_remote_code: str = "",
        encoder: str = "",
        face_pack: str = "",
    ) -> tuple[bytes, str, bytes]:
        """Generate a LoRA.

        Args:
            images: [n, h, w, 3] in [0, 1], all of one subject.
            model: Folder or hub id of a model from photos; empty for ``listed_model``. With a
                server the name of one of its models.
            server: Address of a hyperlora server; empty for this process.
            rank: Rank of the LoRA; 0 for the model's own.
            listed_model: The model by its name in the list.
            trust_remote_code: SHA-256 of the code of a template that may run.
            encoder: Folder or hub id of the image encoder; empty for the network's own.
            face_pack: Folder or name of the face pack; empty for the network's own.

        Returns:
            The bytes of a ``.safetensors`` file; the words with which prompts must begin; and the
            file for the negative branch of guidance, empty where that has no LoRA.

        Raises:
            ValueError: Encoder or face pack are given for a server.
        """
        if server and (encoder or face_pack):
            raise ValueError(
                "a server has its own encoder and face pack: leave them empty here, or give "
                "--encoder and --face-pack to hyperlora serve"
            )
        photos = [_encode_png(image) for image in images]
        if server:
            return _add_outputs(*_request_lora(server, photos, rank, model))
        from hyperlora.data.images import read_image
        from hyperlora.pipelines.config import GenerationConfig
        from hyperlora.pipelines.generate import generate_loras, generate_negatives
        from hyperlora.pipelines.lora_files import serialize_lora_files
        from hyperlora.pipelines.photo_model import SubjectPhotos

        name = model or find_listed_model(listed_model)
        pipeline = load_photo_model(name, trust_remote_code, encoder, face_pack)
        subject = SubjectPhotos.from_images([read_image(photo) for photo in photos], pipeline)
        config = GenerationConfig(rank=rank or None)
        features = pipeline.encode_subjects([subject])
        weights = generate_loras(pipeline, [subject], config, features=features)[0]
        negatives = generate_negatives(pipeline, features, config)
        negative = None if negatives is None else negatives[0]
        lora_format = _choose_format(weights.layout, pipeline.card.architecture)
        files = serialize_lora_files(
            pipeline, weights, negative, photos, ("LoRA", "LoRA"), lora_format
        )
        return _add_outputs(files.data, files.negative)


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

        pipeline = load_pair_to_lora(model)
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
            lora: The bytes of a ``.safetensors`` file; empty for no LoRA.
            strength: Factor of the LoRA.
            clip: The text encoder of the model.

        Returns:
            Patched copies of the model and the text encoder.
        """
        if not lora:
            return model, clip
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

        if not lora:
            raise ValueError(
                "there is no LoRA to save: the negative branch has none by the model's rule"
            )
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


def _add_outputs(lora: bytes, negative: bytes | None) -> tuple[bytes, str, bytes]:
    """Add the words for prompts, and the LoRA of the negative branch by the file's own rule."""
    from hyperlora.lora.io.load import load_lora
    from hyperlora.lora.io.negative_lora import get_negative_rule
    from hyperlora.lora.io.prompt_prefix import PROMPT_PREFIX_KEY

    metadata = load_lora(lora).metadata
    trigger = metadata.extra.get(PROMPT_PREFIX_KEY) or metadata.trigger_phrase
    if get_negative_rule(metadata) == "off":
        return lora, trigger, b""
    return lora, trigger, negative or lora


def _request_lora(
    server: str, photos: list[bytes], rank: int, model: str
) -> tuple[bytes, bytes | None]:
    """Ask a server for the LoRA of photos, in the format that ComfyUI reads for its base."""
    from hyperlora import Client

    with Client(server, os.environ.get(API_KEY_ENV)) as client:
        infos = client.list_models()
        model_info = next((info for info in infos if info["id"] == model), infos[0])
        is_unread = model_info["lora_format"] == "diffusers" and (
            "ComfyUI" not in model_info["lora_readers"]
        )
        options: dict[str, str | int] = {"rank": rank} if rank else {}
        options |= {"model": model} if model else {}
        lora_format = "comfyui" if is_unread else "auto"
        return client.create_lora_files(photos, format=lora_format, **options)


def _serialize_lora(lora: "Lora") -> bytes:
    """Write a LoRA with key names that ComfyUI reads."""
    return lora.serialize(format=_choose_format(lora.weights.layout, lora.metadata.architecture))


def _choose_format(layout: "LoraLayout", architecture: str) -> "FormatChoice":
    """Choose key names that ComfyUI reads: those of ``auto``, else its own."""
    from hyperlora.lora.io.formats import READERS, detect_family, list_readers, resolve_format

    readers = list_readers(layout, resolve_format("auto", layout, architecture), architecture)
    own_readers = READERS.get(detect_family(layout, architecture), {}).get("comfyui", ())
    is_unread = "ComfyUI" not in readers and "ComfyUI" in own_readers
    return "comfyui" if is_unread else "auto"


def _encode_png(image: torch.Tensor) -> bytes:
    """Encode [h, w, 3 or 4] in [0, 1] as a PNG file; alpha is dropped."""
    pixels = image[..., :3].clamp(0, 1).mul(255).round().to("cpu", torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
