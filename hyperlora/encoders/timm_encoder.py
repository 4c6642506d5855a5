"""``TimmEncoder``: any timm backbone as an encoder of photos."""

from typing import Any, TypedDict

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.features import ImageFeatures
from hyperlora.hub_connection import format_offline_error, require_cache_if_offline


class TimmEncoderConfig(TypedDict):
    """The arguments that rebuild a ``TimmEncoder``."""

    name: str
    image_size: int
    options: dict[str, Any]
    license: str
    patch_pixels: int


class TimmEncoder(nn.Module):
    """A timm backbone without its head, from photos to patch tokens.

    Args:
        name: A timm id, e.g. ``vit_small_patch14_dinov2``.
        image_size: Height and width in pixels to which images are resized.
        pretrained: Whether timm's weights are downloaded.
        options: Further arguments of ``timm.create_model``.
        license: License of the weights; by default timm's if ``pretrained``, else the bundle's.
        patch_pixels: If above 0, every token also holds its own patch of the image, resized to
            this many pixels a side. The backbone must then give a feature map.

    Raises:
        ModelLoadError: The weights are not in the cache, and the hub cannot be reached.

    Attributes:
        config: The arguments that rebuild the encoder.
        mean: Mean of the backbone's normalization, [3, 1, 1].
        std: Standard deviation of the backbone's normalization, [3, 1, 1].
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
        is_offline = pretrained and require_cache_if_offline()
        try:
            self.backbone = timm.create_model(
                name, pretrained=pretrained, num_classes=0, **(options or {})
            )
        except OSError as error:
            if is_offline:
                raise ModelLoadError(format_offline_error(f"encoder {name!r}")) from error
            raise
        self.image_size = image_size
        data_config = timm.data.resolve_data_config({}, model=self.backbone)
        mean = torch.tensor(data_config["mean"]).view(3, 1, 1)
        std = torch.tensor(data_config["std"]).view(3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        if license is None and pretrained:
            license = str(self.backbone.pretrained_cfg.get("license") or "unknown")
        self.license = "as the bundle" if license is None else license
        self.patch_pixels = patch_pixels
        self.config: TimmEncoderConfig = {
            "name": name,
            "image_size": image_size,
            "options": options or {},
            "license": self.license,
            "patch_pixels": patch_pixels,
        }

    @property
    def width(self) -> int:
        """Numbers per token."""
        return int(self.backbone.num_features) + 3 * self.patch_pixels**2

    def forward(self, images: Tensor) -> ImageFeatures:
        """Encode photos.

        Args:
            images: [batch, views, 3, height, width] in [0, 1], on any device.

        Returns:
            Tokens [batch, views, tokens, width], on the device of the encoder.

        Raises:
            InvalidArgumentError: ``patch_pixels`` is set and the backbone has no feature map.
        """
        pixels = self._normalize_images(images.flatten(0, 1))  # [n, 3, size, size]
        features = self.backbone.forward_features(pixels)
        if features.ndim == 4:  # a convolutional backbone: [n, channels, grid, grid]
            patches = self._get_patch_pixels(pixels, features.shape[-2:])
            features = torch.cat([features, *patches], 1)  # [n, width, grid, grid]
            tokens = features.flatten(2).mT  # [n, tokens, width]
        elif self.patch_pixels:
            raise InvalidArgumentError(
                f"patch_pixels needs a feature map, {self.config['name']} has none: "
                f"set patch_pixels to 0"
            )
        else:
            tokens = features  # [n, tokens, width]
        return ImageFeatures(tokens.unflatten(0, images.shape[:2]))

    def _get_patch_pixels(self, pixels: Tensor, grid_size: torch.Size) -> list[Tensor]:
        """The pixels of every patch, [n, 3 * patch_pixels², *grid_size]; [] without them."""
        if not self.patch_pixels:
            return []
        size = (grid_size[0] * self.patch_pixels, grid_size[1] * self.patch_pixels)
        downsampled = F.adaptive_avg_pool2d(pixels, size)  # [n, 3, *size]
        return [F.pixel_unshuffle(downsampled, self.patch_pixels)]

    def compute_pooled_features(self, images: Tensor) -> Tensor:
        """Compute the pooled feature of the backbone.

        Args:
            images: [n, 3, height, width] in [0, 1].

        Returns:
            [n, num_features].
        """
        features = self.backbone.forward_features(self._normalize_images(images))
        return self.backbone.forward_head(features, pre_logits=True)

    def _normalize_images(self, images: Tensor) -> Tensor:
        """Resize images [n, 3, h, w] in [0, 1] and normalize them, on the encoder's device."""
        images, size = images.to(self.mean), (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(
                images, size, mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        return (images - self.mean) / self.std
