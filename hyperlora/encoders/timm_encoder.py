"""Any timm backbone as an encoder of photos."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from hyperlora.errors import InvalidArgumentError
from hyperlora.features import ImageFeatures


class TimmEncoder(nn.Module):
    """A timm backbone without its head: images [batch, views, 3, h, w] in [0, 1] to patch tokens.

    ``name`` is a timm id, ``image_size`` what it was trained at (other sizes are resized to it), ``options`` go to
    ``timm.create_model``; ``license`` is the weights' (asked of timm when ``pretrained``). Normalisation is the
    backbone's own. With ``patch_pixels`` every token also holds its own part of the picture, shrunk to that many pixels a
    side: what a trunk that names things forgets (it takes a feature map, so a convolutional backbone).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        image_size: int = 224,
        pretrained: bool = False,
        options: dict[str, Any] | None = None,
        license: str | None = None,
        patch_pixels: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            name, pretrained=pretrained, num_classes=0, **(options or {})
        )
        self.image_size = image_size
        data_config = timm.data.resolve_data_config({}, model=self.backbone)
        self.register_buffer(
            "mean", torch.tensor(data_config["mean"]).view(3, 1, 1), persistent=False
        )
        self.register_buffer(
            "std", torch.tensor(data_config["std"]).view(3, 1, 1), persistent=False
        )
        if license is None:
            license = (
                str(self.backbone.pretrained_cfg.get("license") or "unknown")
                if pretrained
                else "as the bundle"
            )
        self.license = license
        self.patch_pixels = patch_pixels
        self.config: dict[str, Any] = {
            "name": name,
            "image_size": image_size,
            "options": options or {},
            "licence": license,
            "colours": patch_pixels,
        }

    @property
    def width(self) -> int:
        return int(self.backbone.num_features) + 3 * self.patch_pixels**2

    def forward(self, images: Tensor) -> ImageFeatures:
        pixels = self._normalize_images(images.flatten(0, 1))
        tokens = self.backbone.forward_features(pixels)
        if tokens.ndim == 4:  # a convolutional backbone: positions become tokens
            tokens = (
                torch.cat([tokens, *self._get_patch_pixels(pixels, tokens.shape[-2:])], 1)
                .flatten(2)
                .mT
            )
        elif self.patch_pixels:
            raise InvalidArgumentError(
                f"colours beside tokens need a feature map, {self.config['name']} has none: set colours to 0"
            )
        return ImageFeatures(tokens.unflatten(0, images.shape[:2]))

    def _get_patch_pixels(self, pixels: Tensor, grid_size: torch.Size) -> list[Tensor]:
        """[n, 3 * colours², *grid]: what lies under each place of the feature map; nothing without ``patch_pixels``."""
        if not self.patch_pixels:
            return []
        downsampled = nn.functional.adaptive_avg_pool2d(
            pixels, (grid_size[0] * self.patch_pixels, grid_size[1] * self.patch_pixels)
        )
        return [nn.functional.pixel_unshuffle(downsampled, self.patch_pixels)]

    def compute_pooled_features(self, images: Tensor) -> Tensor:
        """[n, 3, h, w] in [0, 1] to the backbone's own pooled feature [n, width]."""
        features = self.backbone.forward_features(self._normalize_images(images))
        return self.backbone.forward_head(features, pre_logits=True)

    def _normalize_images(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = nn.functional.interpolate(
                images,
                (self.image_size, self.image_size),
                mode="bicubic",
                antialias=True,
                align_corners=False,
            ).clamp(0, 1)
        return (images - self.mean) / self.std
