"""The image encoders of released networks: SigLIP2-G384, DINOv3-7B and CLIP-L, streamed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

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


class StreamedImageEncoder(ABC):
    """A vision model of transformers whose weights are read from a file while it computes.

    Args:
        model_fn: Builds the model.
        path: Its weights.
        image_size: Pixels per side of what it sees.
        width: Numbers of an embedding.
        device: Where it runs.
        dtype: Its precision.
        rename_fn: From the name of a tensor in the file to that in the model; None skips it.

    Raises:
        ModelLoadError: The file holds another model, or is not whole.
    """

    output_name: ClassVar[str] = "pooler_output"
    """The field of the model's output that is the embedding."""

    def __init__(
        self,
        model_fn: Callable[[], nn.Module],
        path: Path,
        image_size: int,
        width: int,
        device: torch.device | str,
        dtype: torch.dtype,
        rename_fn: Callable[[str], str | None] = str,
    ) -> None:
        self.image_size, self.width = image_size, width
        self.device, self.dtype = torch.device(device), dtype
        self.model = build_streamed_module(
            model_fn, TensorFiles([path]), rename_fn=rename_fn, dtype=dtype, device=self.device
        )

    @abstractmethod
    def make_pixels(self, image: Image.Image) -> Tensor:
        """Convert an RGB image to normalized pixels, [3, size, size]."""

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Encode images.

        Args:
            images: RGB images; squares, except for CLIP.

        Returns:
            [images, width], float32, on the CPU.
        """
        outputs = []
        for start in range(0, len(images), MAX_BATCH):
            pixels = torch.stack([self.make_pixels(i) for i in images[start : start + MAX_BATCH]])
            output = self.model(pixels.to(self.device, self.dtype))
            outputs.append(getattr(output, self.output_name).float().cpu())
        return torch.cat(outputs)


class SiglipEncoder(StreamedImageEncoder):
    """Pooled embeddings of SigLIP2.

    Args:
        path: Its weights, without prefix.
        config: Its sizes; those of SigLIP2-G384 by default.
        device: Where it runs.
        dtype: The precision; bfloat16 where the device is fast in it by default.
    """

    def __init__(
        self,
        path: Path,
        config: "SiglipVisionConfig | None" = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        from transformers import SiglipVisionModel

        sizes = config or make_siglip2_config()
        super().__init__(
            lambda: SiglipVisionModel(sizes),
            path,
            int(sizes.image_size),
            int(sizes.hidden_size),
            device,
            dtype or choose_encoder_dtype(torch.device(device)),
        )

    def make_pixels(self, image: Image.Image) -> Tensor:
        """Resize and normalize as SigLIP2 was trained."""
        return make_siglip_pixels(image, self.image_size)


class Dinov3Encoder(StreamedImageEncoder):
    """Class tokens of DINOv3 after its last norm.

    Args:
        path: Its weights; the keys of layers may lack ``model.``.
        config: Its sizes; those of DINOv3-7B by default.
        device: Where it runs.
        dtype: The precision; bfloat16 where the device is fast in it by default.
    """

    def __init__(
        self,
        path: Path,
        config: "DINOv3ViTConfig | None" = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        from transformers import DINOv3ViTModel

        sizes = config or make_dinov3_config()
        super().__init__(
            lambda: DINOv3ViTModel(sizes),
            path,
            int(sizes.image_size),
            int(sizes.hidden_size),
            device,
            dtype or choose_encoder_dtype(torch.device(device)),
            lambda name: f"model.{name}" if name.startswith("layer.") else name,
        )

    def make_pixels(self, image: Image.Image) -> Tensor:
        """Resize and normalize as DINOv3 was trained."""
        return make_dinov3_pixels(image, self.image_size)


class ClipImageEncoder(StreamedImageEncoder):
    """Projected image embeddings of CLIP, not normalized.

    Args:
        path: The weights of CLIP or of its vision half; text tensors are skipped.
        config: Its sizes; those of CLIP-L by default.
        device: Where it runs.
        dtype: The precision; float32 by default.
    """

    output_name = "image_embeds"

    def __init__(
        self,
        path: Path,
        config: "CLIPVisionConfig | None" = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from transformers import CLIPVisionModelWithProjection

        sizes = config or make_clip_config()
        super().__init__(
            lambda: CLIPVisionModelWithProjection(sizes),
            path,
            int(sizes.image_size),
            int(sizes.projection_dim),
            device,
            dtype,
            _rename_clip_tensor,
        )

    def make_pixels(self, image: Image.Image) -> Tensor:
        """Resize, crop and normalize as CLIP was trained."""
        return make_clip_pixels(image, self.image_size)


def _rename_clip_tensor(name: str) -> str | None:
    """Keep the tensors of the vision half; older files also store position ids."""
    is_vision = name.startswith(("vision_model.", "visual_projection."))
    return name if is_vision and not name.endswith("position_ids") else None
