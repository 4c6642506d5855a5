"""CLIP's vision model, streamed from its file, with the pixels that PIL makes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hyperlora.encoders.face_crops import resize_for_clip
from hyperlora.encoders.streamed_encoder import TensorFiles, build_streamed_module
from hyperlora.errors import ModelLoadError

VISION_PREFIX: Final = "vision_model."
"""The names of the vision half in a file of both halves begin so."""
_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
_STD: Final = (0.26862954, 0.26130258, 0.27577711)
_OTHER_HALF: Final = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


class ClipVisionEncoder:
    """The tokens before the last layer of CLIP's vision model, without its last norm.

    Args:
        config_path: ``config.json`` of a CLIP model or of its vision half.
        weights_path: The safetensors file of either.
        device: Where the model runs.

    Raises:
        ModelLoadError: A file is missing, damaged or of another model.
    """

    def __init__(
        self, config_path: Path, weights_path: Path, device: torch.device | str = "cpu"
    ) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        try:
            fields = json.loads(config_path.read_text(encoding="utf-8"))
            config = CLIPVisionConfig.from_dict(fields.get("vision_config", fields))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ModelLoadError(
                f"{config_path} is no configuration of CLIP: fetch it again"
            ) from error
        last_layer = f"encoder.layers.{config.num_hidden_layers - 1}."
        config.num_hidden_layers -= 1  # the output of the last layer is not used

        def rename(name: str) -> str | None:
            """Return the parameter of a tensor; None for those of other parts."""
            path = name.removeprefix(VISION_PREFIX)
            is_unused = path.startswith((*_OTHER_HALF, last_layer)) or path.endswith("position_ids")
            return None if is_unused else path

        self.device = torch.device(device)
        self.config = config
        self._files = TensorFiles([weights_path])
        self._model = build_streamed_module(
            lambda: CLIPVisionModel(config), self._files, rename_fn=rename, device=self.device
        )

    @property
    def width(self) -> int:
        """Width of a token."""
        return int(self.config.hidden_size)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Encode images.

        Args:
            images: RGB, of any size.

        Returns:
            [images, tokens, width] in float32, on the CPU.
        """
        pixels = torch.stack([make_clip_pixels(image) for image in images]).to(self.device)
        tokens: Tensor = self._model(pixel_values=pixels).last_hidden_state
        return tokens.cpu()


def make_clip_pixels(image: Image.Image) -> Tensor:
    """Convert an image to CLIP's pixels.

    Args:
        image: RGB, of any size.

    Returns:
        [3, 224, 224], normalized.
    """
    array = np.array(resize_for_clip(image), dtype=np.float32) / 255  # [224, 224, 3]
    pixels = (array - np.array(_MEAN, np.float32)) / np.array(_STD, np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)
