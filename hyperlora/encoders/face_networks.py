"""The two small networks of a face pack: a detector as SCRFD, a recognizer as ArcFace."""

import json
import os
from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any, Final, Self

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.errors import ModelLoadError

STRIDE: Final = 8
"""Pixels between anchors of one level."""
ANCHOR_SIZES: Final = (32.0, 88.0)
"""Side in pixels (root of the area) of a typical face for each of the two anchors per position."""
_OUTPUTS_PER_ANCHOR: Final = 15  # a score, four sides, five keypoints
_ALIGNED_FACE_SIZE: Final = 112  # pixels of insightface's aligned faces
_LEVELS: Final = (1, 2, 4)  # downsampling of the image, for strides 8, 16 and 32


class _PretrainedNetwork(nn.Module):
    """A network that is saved as ``config.json`` and ``model.safetensors``."""

    config: Mapping[str, object]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors`` (float16)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1))
        save_file(
            {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()},
            folder / "model.safetensors",
        )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Load what ``save_pretrained`` wrote, frozen and in evaluation mode.

        Raises:
            ModelLoadError: The folder holds no such network.
        """
        folder = Path(folder)
        try:
            network = cls(**json.loads((folder / "config.json").read_text()))
            state_dict = load_file(folder / "model.safetensors")
            network.load_state_dict({name: tensor.float() for name, tensor in state_dict.items()})
        except (OSError, TypeError, ValueError, RuntimeError) as error:
            raise ModelLoadError(
                f"{folder} holds no {cls.__name__}: config.json and model.safetensors expected"
            ) from error
        return network.eval().requires_grad_(False)


class FaceDetector(_PretrainedNetwork):
    """One small network, applied to the image at full, half and quarter size.

    The three levels have strides 8, 16 and 32 and share their weights, so training at one image
    size detects faces over three octaves. Non-maximum suppression merges detections of several
    levels. Every position has two anchors, one for small faces and one for large faces.

    Args:
        widths: Channels at strides 2, 4 and 8.
        score_threshold: Probability that becomes the score 0.5, from which insightface counts a
            detection.
    """

    def __init__(self, widths: Sequence[int] = (16, 24, 40), score_threshold: float = 0.8) -> None:
        super().__init__()
        self.config = {"widths": list(widths), "score_threshold": score_threshold}
        self.score_bias = log(score_threshold / (1 - score_threshold))
        stem_width, middle_width, width = widths
        self.fine = nn.Sequential(
            _make_conv_block(3, stem_width, stride=2),
            _make_conv_block(stem_width, middle_width, stride=2),
            _make_conv_block(middle_width, width, stride=2),
            _ResidualBlock(width),
        )
        self.coarse = nn.Sequential(
            _make_conv_block(width, width, stride=2),
            _ResidualBlock(width),
            _ResidualBlock(width, dilation=2),
        )
        self.lateral_conv = _make_conv_block(width, width, kernel_size=1)
        self.fuse_conv = _make_conv_block(width, width)
        self.head = nn.Conv2d(width, len(ANCHOR_SIZES) * _OUTPUTS_PER_ANCHOR, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        # at the start: no face, boxes of the anchor's side
        init_bias = torch.tensor([-4.0] + [0.5] * 4 + [0.0] * 10)  # [15]
        self.head.bias = nn.Parameter(init_bias.repeat(len(ANCHOR_SIZES)))

    def forward_level(self, images: Tensor) -> Tensor:
        """Predict faces at one level.

        Args:
            images: [n, 3, height, width], RGB, (pixel - 127.5) / 128.

        Returns:
            [n, height / 8, width / 8, anchors, 15]: logit of the score, distances to left, top,
            right and bottom, and x, y of five keypoints, from the anchor's position in sides of
            the anchor.
        """
        fine = self.fine(images)  # [n, c, h/8, w/8]
        coarse = self.lateral_conv(self.coarse(fine))  # [n, c, h/16, w/16]
        coarse = F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")  # [n, c, h/8, w/8]
        predictions = self.head(self.fuse_conv(fine + coarse))  # [n, anchors * 15, h/8, w/8]
        predictions = predictions.permute(0, 2, 3, 1)  # [n, h/8, w/8, anchors * 15]
        return predictions.unflatten(-1, (len(ANCHOR_SIZES), _OUTPUTS_PER_ANCHOR))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Predict faces at all levels, in the format of SCRFD's ONNX models.

        Args:
            images: One image [1, 3, height, width], RGB, (pixel - 127.5) / 128; both sides are
                multiples of 32.

        Returns:
            Nine tensors: scores [k, 1], boxes [k, 4] and keypoints [k, 10] in strides, each at
            strides 8, 16 and 32.
        """
        anchor_strides = torch.tensor(ANCHOR_SIZES, device=images.device).view(-1, 1) / STRIDE
        scores, boxes, keypoints = [], [], []
        for downsample_factor in _LEVELS:
            level_images = (
                images if downsample_factor == 1 else F.avg_pool2d(images, downsample_factor)
            )
            predictions = self.forward_level(level_images)[0]  # [h/8, w/8, anchors, 15]
            scores.append((predictions[..., :1] - self.score_bias).sigmoid().reshape(-1, 1))
            boxes.append((predictions[..., 1:5] * anchor_strides).reshape(-1, 4))
            keypoints.append((predictions[..., 5:] * anchor_strides).reshape(-1, 10))
        return (*scores, *boxes, *keypoints)


class FaceRecognizer(_PretrainedNetwork):
    """A timm backbone and a linear map, from an aligned face to its embedding.

    Faces are downsampled by 2 first: those of portraits at 128 pixels were upsampled by more.

    Args:
        backbone: A timm id.
        width: Numbers per embedding.
        options: Further arguments of ``timm.create_model``.
    """

    def __init__(
        self, backbone: str, width: int = 512, options: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.config = {"backbone": backbone, "width": width, "options": options or {}}
        self.backbone = timm.create_model(backbone, num_classes=0, **(options or {}))
        self.embedding = nn.Linear(int(self.backbone.num_features), width)

    def forward(self, faces: Tensor) -> Tensor:
        """Embed aligned faces.

        Args:
            faces: [n, 3, 112, 112], RGB, (pixel - 127.5) / 127.5.

        Returns:
            [n, width] of any length.
        """
        return self.embedding(self.backbone(F.avg_pool2d(faces, 2)))

    @property
    def example_input(self) -> Tensor:
        """Input of ``forward`` for tracing, [1, 3, 112, 112]."""
        return torch.zeros(1, 3, _ALIGNED_FACE_SIZE, _ALIGNED_FACE_SIZE)


class _ResidualBlock(nn.Module):
    def __init__(self, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            _make_conv_block(width, width, dilation=dilation),
            _make_conv_block(width, width, dilation=dilation),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add two convolutions to the input [n, width, h, w]."""
        return x + self.convs(x)


def _make_conv_block(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, dilation: int = 1
) -> nn.Module:
    """Convolution of equal output size (at stride 1), batch norm and ReLU."""
    padding = dilation * (kernel_size // 2)
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())
