"""Four nodes: images, or a pair before and after an edit, to a LoRA (in this process or by a server); apply; save it.

A LoRA travels between them as the bytes of a ``.safetensors`` file, under the type HYPERLORA. ComfyUI reads kohya's
keys for UNets and diffusers' for transformers, so that is how the file is written.
"""

import io
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

CATEGORY = "hyperlora"
API_KEY_ENV = "HYPERLORA_API_KEY"
"""Where the server's API key is read from: what is typed into a node ends up in every picture's metadata."""


class ImagesToLora:
    """All images of the batch show one subject."""

    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("HYPERLORA",)
    RETURN_NAMES = ("lora",)
    DESCRIPTION = "A LoRA from one or several images of a subject, in one forward pass."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {"images": ("IMAGE",)},
            "optional": {
                "model": (
                    "STRING",
                    {"default": "", "tooltip": "Folder or hub id; empty: the avatars bundle."},
                ),
                "server": (
                    "STRING",
                    {"default": "", "tooltip": "http://... of a hyperlora server; empty: in here."},
                ),
                "rank": (
                    "INT",
                    {"default": 0, "min": 0, "max": 128, "tooltip": "0: the model's own."},
                ),
            },
        }

    def generate_lora(
        self, images: torch.Tensor, model: str = "", server: str = "", rank: int = 0
    ) -> tuple[bytes]:
        """``images`` [n, h, w, 3] in [0, 1]."""
        photos = [_encode_png(image) for image in images]
        if server:
            from hyperlora import Client

            with Client(server, os.environ.get(API_KEY_ENV)) as client:
                (model_info,) = client.list_models()[:1]
                options: dict[str, Any] = {"format": model_info["lora_format"]}
                return (client.create_lora(photos, **options | ({"rank": rank} if rank else {})),)
        from hyperlora.data.images import read_image
        from hyperlora.lora.io.save import serialize_lora
        from hyperlora.pipelines.config import GenerationConfig
        from hyperlora.pipelines.generate import SubjectPhotos, generate_loras

        pipeline = _load_image_to_lora(model)
        subject = SubjectPhotos.from_images([read_image(photo) for photo in photos], pipeline)
        weights = generate_loras(pipeline, [subject], GenerationConfig(rank=rank or None))[0]
        lora_format = "kohya" if "unet" in pipeline.layout.components else "diffusers"
        return (
            serialize_lora(
                weights, format=lora_format, metadata=pipeline.make_metadata("LoRA", photos)
            ),
        )


class PairToLora:
    """The change from one image to another; further images in the batches are further pairs of the same edit."""

    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("HYPERLORA",)
    DESCRIPTION = (
        "A LoRA of the edit between an image before and after it, for an InstructPix2Pix model."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {"before": ("IMAGE",), "after": ("IMAGE",)},
            "optional": {
                "model": (
                    "STRING",
                    {"default": "", "tooltip": "Folder or hub id; empty: the bundled one."},
                ),
                "server": (
                    "STRING",
                    {"default": "", "tooltip": "Address of a hyperlora server; empty: here."},
                ),
            },
        }

    def generate_lora(
        self, before: torch.Tensor, after: torch.Tensor, model: str = "", server: str = ""
    ) -> tuple[bytes]:
        """``before`` and ``after`` [n, h, w, 3] in [0, 1]."""
        if before.shape != after.shape:
            raise ValueError(
                f"before is {list(before.shape)}, after {list(after.shape)}: the same size is expected"
            )
        pairs = [(_encode_png(a), _encode_png(b)) for a, b in zip(before, after, strict=True)]
        if server:
            from hyperlora import Client

            with Client(server, os.environ.get(API_KEY_ENV)) as client:
                return (client.create_edit_lora(pairs, format="kohya"),)
        from dataclasses import replace

        pipeline = _load_pair_to_lora(model)
        lora = pipeline(pairs)
        metadata = pipeline.make_metadata("change", pairs)
        return (replace(lora, metadata=metadata).serialize(format="kohya"),)


class ApplyLora:
    """On a model and, if given, its text encoder."""

    CATEGORY = CATEGORY
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL", "CLIP")
    DESCRIPTION = "The model with the LoRA added."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        strength = ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05})
        return {
            "required": {"model": ("MODEL",), "lora": ("HYPERLORA",), "strength": strength},
            "optional": {"clip": ("CLIP",)},
        }

    def apply_lora(
        self, model: Any, lora: bytes, strength: float, clip: Any = None
    ) -> tuple[Any, Any]:
        """ComfyUI's own loader does it, and warns of keys it does not know."""
        import comfy.sd
        from safetensors.torch import load

        patched_model, patched_clip = comfy.sd.load_lora_for_models(
            model, clip, load(lora), strength, strength
        )
        return patched_model, patched_clip


class SaveLora:
    """Into ComfyUI's folder of LoRAs, where its loader lists it."""

    CATEGORY = CATEGORY
    FUNCTION = "save"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ()
    OUTPUT_NODE = True
    DESCRIPTION = "Writes the LoRA into the folder of LoRAs."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"lora": ("HYPERLORA",), "name": ("STRING", {"default": "hyperlora"})}}

    def save_lora(self, lora: bytes, name: str) -> dict[str, Any]:
        """Never over another file: a number is added."""
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


@lru_cache(maxsize=1)
def _load_image_to_lora(name: str) -> Any:
    from hyperlora import ImageToLora, pretrained

    return ImageToLora.from_pretrained(name or pretrained.IMAGE_TO_LORA_DIR)


@lru_cache(maxsize=1)
def _load_pair_to_lora(name: str) -> Any:
    from hyperlora import PairToLora, pretrained

    return PairToLora.from_pretrained(name or pretrained.PAIR_TO_LORA_DIR)


def _encode_png(image: torch.Tensor) -> bytes:
    pixels = image[..., :3].clamp(0, 1).mul(255).round().to("cpu", torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
