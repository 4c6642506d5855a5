"""Small networks that a face pack is made of: a detector of the SCRFD kind and a recogniser of the ArcFace kind."""

import json
import os
from collections.abc import Sequence
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
"""Pixels between the anchors of one level."""
ANCHOR_SIZES: Final = (32.0, 88.0)
"""Typical side of a face (root of its area, in pixels of the level) of each of the two anchors of a place."""
_OUTPUTS_PER_ANCHOR: Final = 15  # a score, four sides, five points
_ALIGNED_FACE_SIZE: Final = 112  # insightface aligns faces to so many pixels


class _PretrainedNetwork(nn.Module):
    """A network that is a ``config.json`` and a ``model.safetensors`` on disk."""

    config: dict[str, Any]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors`` (fp16)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1))
        save_file(
            {k: v.half().contiguous() for k, v in self.state_dict().items()},
            folder / "model.safetensors",
        )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Read what ``save_pretrained`` wrote. Raises ``ModelLoadError`` if the folder holds no such network."""
        folder = Path(folder)
        try:
            network = cls(**json.loads((folder / "config.json").read_text()))
            network.load_state_dict(
                {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
            )
        except (OSError, TypeError, ValueError, RuntimeError) as error:
            raise ModelLoadError(
                f"{folder} holds no {cls.__name__}: config.json and model.safetensors expected"
            ) from error
        return network.eval().requires_grad_(False)


class FaceDetector(_PretrainedNetwork):
    """One small network looks at a picture at full, half and quarter size: strides 8, 16 and 32 with the same weights.

    So it is trained on one size of pictures and finds faces three octaves apart; what several levels see, non-maximum
    suppression makes one. A place has two anchors, of which one answers for small faces and one for large ones.
    insightface counts a score from 0.5 on; what the network gives the probability ``score_threshold`` scores that.
    """

    def __init__(self, widths: Sequence[int] = (16, 24, 40), score_threshold: float = 0.8) -> None:
        super().__init__()
        self.config = {"widths": list(widths), "sure": score_threshold}
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
        init_bias = torch.tensor(
            [-4.0] + [0.5] * 4 + [0.0] * 10
        )  # no face, and boxes of the anchor's side
        self.head.bias = nn.Parameter(init_bias.repeat(len(ANCHOR_SIZES)))

    def forward_level(self, images: Tensor) -> Tensor:
        """images [n, 3, h, w], RGB, (pixel - 127.5) / 128, to [n, h/8, w/8, anchors, 15]: logits of the scores,
        distances (left, top, right, bottom) and x, y of five points from the anchor's place, in sides of the anchor."""
        fine_features = self.fine(images)
        coarse_features = F.interpolate(
            self.lateral_conv(self.coarse(fine_features)),
            size=fine_features.shape[-2:],
            mode="nearest",
        )
        predictions = self.head(self.fuse_conv(fine_features + coarse_features)).permute(0, 2, 3, 1)
        return predictions.unflatten(-1, (len(ANCHOR_SIZES), _OUTPUTS_PER_ANCHOR))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """One picture [1, 3, h, w], sides multiples of 32, to SCRFD's nine outputs: scores [k, 1], boxes [k, 4] and
        keypoints [k, 10] in strides, each at strides 8, 16 and 32."""
        anchor_strides = torch.tensor(ANCHOR_SIZES, device=images.device).view(-1, 1) / STRIDE
        scores, boxes, keypoints = [], [], []
        for downsample_factor in (1, 2, 4):
            predictions = self.forward_level(
                images if downsample_factor == 1 else F.avg_pool2d(images, downsample_factor)
            )[0]
            scores.append((predictions[..., :1] - self.score_bias).sigmoid().reshape(-1, 1))
            boxes.append((predictions[..., 1:5] * anchor_strides).reshape(-1, 4))
            keypoints.append((predictions[..., 5:] * anchor_strides).reshape(-1, 10))
        return (*scores, *boxes, *keypoints)


class FaceRecognizer(_PretrainedNetwork):
    """An aligned face to ``width`` numbers whose direction says who it is: a timm ``backbone`` (with its ``options``)
    and a linear map.

    The face is halved first: of a portrait at 128 pixels it has been enlarged by more than half.
    """

    def __init__(
        self, backbone: str, width: int = 512, options: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.config = {"backbone": backbone, "width": width, "options": options or {}}
        self.backbone = timm.create_model(backbone, num_classes=0, **(options or {}))
        self.embedding = nn.Linear(int(self.backbone.num_features), width)

    def forward(self, faces: Tensor) -> Tensor:
        """faces [n, 3, 112, 112], RGB, (pixel - 127.5) / 127.5, to [n, width] of any length."""
        return self.embedding(self.backbone(F.avg_pool2d(faces, 2)))

    @property
    def example_input(self) -> Tensor:
        """Faces as ``forward`` takes them."""
        return torch.zeros(1, 3, _ALIGNED_FACE_SIZE, _ALIGNED_FACE_SIZE)


class _ResidualBlock(nn.Module):
    def __init__(self, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            _make_conv_block(width, width, dilation=dilation),
            _make_conv_block(width, width, dilation=dilation),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs(x)


def _make_conv_block(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, dilation: int = 1
) -> nn.Module:
    padding = dilation * (kernel_size // 2)
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())
