"""The image encoders of released networks: SigLIP2-G384, DINOv3-7B and CLIP-L, streamed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from PIL import Image
from torch import Tensor, nn

from hyperlora.encoders.pixel_values import (
    make_clip_pixels,
    make_dinov3_pixels,
    make_siglip_pixels,
)
from hyperlora.encoders.streamed_encoder import (
    TensorFiles,
    build_streamed_module,
    choose_encoder_dtype,
)

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, DINOv3ViTConfig, SiglipVisionConfig

MAX_BATCH: Final = 8
"""Images per pass; each pass reads all weights, and each image takes up to 60 MB."""


def make_siglip2_config() -> "SiglipVisionConfig":
    """Make the configuration of SigLIP2-G384."""
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(
        hidden_size=1536,
        num_hidden_layers=40,
        num_attention_heads=16,
        intermediate_size=6144,
        image_size=384,
        patch_size=16,
        layer_norm_eps=1e-6,
        hidden_act="gelu_pytorch_tanh",
    )


def make_dinov3_config() -> "DINOv3ViTConfig":
    """Make the configuration of DINOv3-7B."""
    from transformers import DINOv3ViTConfig

    return DINOv3ViTConfig(
        hidden_size=4096,
        num_hidden_layers=40,
        num_attention_heads=32,
        intermediate_size=8192,
        image_size=224,
        patch_size=16,
        num_register_tokens=4,
        use_gated_mlp=True,
        hidden_act="silu",
        layer_norm_eps=1e-5,
        rope_theta=100.0,
        pos_embed_rescale=2.0,
        query_bias=False,
        key_bias=False,
        value_bias=False,
        proj_bias=True,
        mlp_bias=True,
    )


def make_clip_config() -> "CLIPVisionConfig":
    """Make the configuration of the vision half of CLIP-L."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        projection_dim=768,
    )


class SiglipEncoder:
    """Pooled embeddings of SigLIP2.

    Args:
        path: Its weights, without prefix.
        config: Its sizes; those of SigLIP2-G384 by default.
        device: Where it runs.
        dtype: The precision; bfloat16 where the device is fast in it by default.

    Raises:
        ModelLoadError: The file holds another model, or is not whole.
    """

    def __init__(
        self,
        path: Path,
        config: "SiglipVisionConfig | None" = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        from transformers import SiglipVisionModel

        config = config or make_siglip2_config()
        self.width = int(config.hidden_size)
        self.image_size = int(config.image_size)
        self.device = torch.device(device)
        self.dtype = dtype or choose_encoder_dtype(self.device)
        self.model = build_streamed_module(
            lambda: SiglipVisionModel(config),
            TensorFiles([path]),
            dtype=self.dtype,
            device=self.device,
        )

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Encode images.

        Args:
            images: RGB squares.

        Returns:
            [images, width], float32, on the CPU.
        """
        pixels = [make_siglip_pixels(image, self.image_size) for image in images]
        return _run_in_batches(self.model, pixels, "pooler_output", self.device, self.dtype)


class Dinov3Encoder:
    """Class tokens of DINOv3 after its last norm.

    Args:
        path: Its weights; the keys of layers may lack ``model.``.
        config: Its sizes; those of DINOv3-7B by default.
        device: Where it runs.
        dtype: The precision; bfloat16 where the device is fast in it by default.

    Raises:
        ModelLoadError: The file holds another model, or is not whole.
    """

    def __init__(
        self,
        path: Path,
        config: "DINOv3ViTConfig | None" = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        from transformers import DINOv3ViTModel

        config = config or make_dinov3_config()
        self.width = int(config.hidden_size)
        self.image_size = int(config.image_size)
        self.device = torch.device(device)
        self.dtype = dtype or choose_encoder_dtype(self.device)
        self.model = build_streamed_module(
            lambda: DINOv3ViTModel(config),
            TensorFiles([path]),
            rename_fn=lambda name: f"model.{name}" if name.startswith("layer.") else name,
            dtype=self.dtype,
            device=self.device,
        )

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Encode images.

        Args:
            images: RGB squares.

        Returns:
            [images, width], float32, on the CPU.
        """
        pixels = [make_dinov3_pixels(image, self.image_size) for image in images]
        return _run_in_batches(self.model, pixels, "pooler_output", self.device, self.dtype)


class ClipImageEncoder:
    """Projected image embeddings of CLIP, not normalized.

    Args:
        path: The weights of CLIP or of its vision half; text tensors are skipped.
        config: Its sizes; those of CLIP-L by default.
        device: Where it runs.
        dtype: The precision; float32 by default.

    Raises:
        ModelLoadError: The file holds another model, or is not whole.
    """

    def __init__(
        self,
        path: Path,
        config: "CLIPVisionConfig | None" = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from transformers import CLIPVisionModelWithProjection

        config = config or make_clip_config()
        self.width = int(config.projection_dim)
        self.image_size = int(config.image_size)
        self.device, self.dtype = torch.device(device), dtype
        self.model = build_streamed_module(
            lambda: CLIPVisionModelWithProjection(config),
            TensorFiles([path]),
            rename_fn=_rename_clip_tensor,
            dtype=self.dtype,
            device=self.device,
        )

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Encode images.

        Args:
            images: RGB images of any size.

        Returns:
            [images, projection], float32, on the CPU.
        """
        pixels = [make_clip_pixels(image, self.image_size) for image in images]
        return _run_in_batches(self.model, pixels, "image_embeds", self.device, self.dtype)


def _rename_clip_tensor(name: str) -> str | None:
    """Keep the tensors of the vision half; older files also store position ids."""
    is_vision = name.startswith(("vision_model.", "visual_projection."))
    return name if is_vision and not name.endswith("position_ids") else None


@torch.no_grad()
def _run_in_batches(
    model: nn.Module,
    pixels: Sequence[Tensor],
    output_name: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Run a vision model on normalized pixels [3, h, w]; one output row per image."""
    outputs = []
    for start in range(0, len(pixels), MAX_BATCH):
        batch = torch.stack(list(pixels[start : start + MAX_BATCH])).to(device, dtype)
        outputs.append(getattr(model(batch), output_name).float().cpu())
    return torch.cat(outputs)
