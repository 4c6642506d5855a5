"""The files of HyperLoRA: sizes, targets and bases, read from their headers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from hyperlora.encoders.streamed_encoder import TensorFiles, build_streamed_module
from hyperlora.errors import InvalidLoraFileError, ModelLoadError
from hyperlora.lora.io.keys import convert_path_to_sgm, parse_kohya_stem
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.hyperlora_resampler import (
    NUM_ROWS_PER_ATTENTION,
    HyperLoraResampler,
    IdProjector,
    mix_basis,
)

_PROJECTIONS: Final = ("to_q", "to_k", "to_v", "to_out")
"""Of each attention, in the order of the coefficients."""
_MAX_DEPTH: Final = 12
"""Transformer blocks of one attention block that are listed; SDXL has ten."""
_PATH_BY_PROJECTION: Final = {"to_out": "to_out.0"}


@dataclass(frozen=True)
class HyperLoraFiles:
    """The four files of one variant on this machine.

    Attributes:
        index: ``hyper_lora_modules.json``: sizes by attention, in the order of the bases.
        modules: ``hyper_lora_modules.safetensors``: the bases.
        resampler: ``resampler.safetensors``.
        id_projector: ``id_projector.safetensors``.
    """

    index: Mapping[str, object]
    modules: Path
    resampler: Path
    id_projector: Path

    def make_layout(self, base: str) -> LoraLayout:
        """Make the layout of the LoRAs from the index and the header of the bases.

        Args:
            base: The hub id of the base.

        Returns:
            The layout: for each attention query, key, value and output.

        Raises:
            ModelLoadError: The files do not belong together.
        """
        with TensorFiles([self.modules]) as files:
            shapes = files.shapes
        targets: list[TargetModule] = []
        ranks = set()
        for i, (key, sizes) in enumerate(self.index.items()):
            attention = _parse_attention(key)
            hidden_size, context_size = _parse_sizes(key, sizes)
            for projection in _PROJECTIONS:
                name = f"{i}.{projection}"
                in_size = context_size if projection in ("to_k", "to_v") else hidden_size
                down = shapes.get(f"{name}.id_down_basis", ())
                up = shapes.get(f"{name}.id_up_basis", ())
                rank = down[-1] if down else 0
                if down[1:] != (in_size, rank) or up[1:] != (rank, hidden_size):
                    raise ModelLoadError(
                        f"{self.modules} does not belong to hyper_lora_modules.json: {key} "
                        f"{projection} of {in_size} to {hidden_size} expected; fetch both files of "
                        "one variant again"
                    )
                ranks.add(rank)
                path = f"{attention}.{_PATH_BY_PROJECTION.get(projection, projection)}"
                targets.append(TargetModule(path, in_size, hidden_size))
        num_bases = 2 * len(targets)
        if len(ranks) != 1 or len(shapes) != num_bases:
            raise ModelLoadError(
                f"{self.modules} has {len(shapes)} tensors of {len(ranks)} ranks, {num_bases} of "
                "one rank expected: fetch it again"
            )
        return LoraLayout(tuple(targets), ranks.pop(), base)

    def build_networks(
        self, num_attentions: int, device: torch.device
    ) -> tuple[nn.Module, nn.Module]:
        """Build the projector and the resampler, whose weights are read when they run.

        Args:
            num_attentions: Attentions of the index.
            device: Where they run.

        Returns:
            ``IdProjector`` and ``HyperLoraResampler``.

        Raises:
            ModelLoadError: A file is damaged or of another network.
        """
        projector_files = TensorFiles([self.id_projector])
        resampler_files = TensorFiles([self.resampler])
        try:
            projector_shapes, shapes = projector_files.shapes, resampler_files.shapes
            num_rows, embedding_dim = projector_shapes["0.weight"]
            (token_dim,) = projector_shapes["2.weight"]
            _, num_queries, dim = shapes["latents"]
            inner_dim, _ = shapes["layers.0.attn1.to_q.weight"]
            ff_dim, _ = shapes["layers.0.ff.net.0.proj.weight"]
            basis_size, _ = shapes["proj_out.weight"]
            id_dim, clip_dim = shapes["proj_in.weight"][1], shapes["proj_in_2.weight"][1]
        except (KeyError, ValueError, IndexError) as error:
            raise ModelLoadError(
                f"{self.resampler} or {self.id_projector.name} is no network of HyperLoRA "
                f"({error}): fetch them again"
            ) from error
        if num_queries != NUM_ROWS_PER_ATTENTION * num_attentions:
            raise ModelLoadError(
                f"{self.resampler} is of another variant: it has {num_queries} queries, "
                f"{NUM_ROWS_PER_ATTENTION * num_attentions} expected; fetch all four files of one"
            )
        num_layers = len({n.split(".")[1] for n in shapes if n.startswith("layers.")})
        projector = build_streamed_module(
            lambda: IdProjector(embedding_dim, num_rows // token_dim, token_dim),
            projector_files,
            device=device,
        )
        resampler = build_streamed_module(
            lambda: HyperLoraResampler(
                num_queries, dim, id_dim, clip_dim, inner_dim, ff_dim, num_layers, basis_size
            ),
            resampler_files,
            device=device,
        )
        return projector, resampler

    def mix_bases(self, coefficients: Tensor, layout: LoraLayout) -> LoraWeights:
        """Mix the bases to LoRAs; one basis is in memory at a time.

        Args:
            coefficients: [subjects, rows, basis size], rows of length 1.
            layout: What ``make_layout`` returns.

        Returns:
            One LoRA per subject (batch axis), with the scale 1/2 (alpha = rank / 2) folded in.

        Raises:
            ModelLoadError: The bases have another size than the coefficients.
        """
        downs, ups = [], []
        with TensorFiles([self.modules]) as files:
            # one buffer for all: memory that is freed between small tensors would not be reused
            buffer = coefficients.new_empty(max(map(prod, files.shapes.values())))
            for row, name in enumerate(_list_bases(len(layout.targets))):
                tensor = files.read(name)
                basis = buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)
                if len(basis) != coefficients.shape[-1]:
                    raise ModelLoadError(
                        f"{self.modules} is of another variant than the resampler: {name} has "
                        f"{len(basis)} bases, {coefficients.shape[-1]} expected"
                    )
                factor = mix_basis(coefficients[:, row], basis).contiguous()
                if name.endswith("down_basis"):
                    downs.append(factor)
                else:
                    ups.append(factor * 0.5)
        return LoraWeights(layout, tuple(downs), tuple(ups))


def _list_bases(num_targets: int) -> Iterator[str]:
    """The names of the bases in the order of the rows of coefficients."""
    for i in range(num_targets):
        attention, projection = divmod(i, len(_PROJECTIONS))
        for factor in ("down", "up"):
            yield f"{attention}.{_PROJECTIONS[projection]}.id_{factor}_basis"


@cache
def _list_attentions() -> dict[str, str]:
    """``unet.….attn1`` by its key in diffusers' and in Stability's spelling, for SDXL's sizes."""
    blocks = ["mid_block.attentions.0"]
    blocks += [f"down_blocks.{i}.attentions.{k}" for i in range(4) for k in range(2)]
    blocks += [f"up_blocks.{i}.attentions.{k}" for i in range(4) for k in range(3)]
    paths = [
        f"{block}.transformer_blocks.{depth}.attn{number}"
        for block in blocks
        for depth in range(_MAX_DEPTH)
        for number in (1, 2)
    ]
    return {
        f"lora_unet_{spelling.replace('.', '_')}": f"unet.{path}"
        for path in paths
        for spelling in (path, convert_path_to_sgm(path))
    }


def _parse_attention(key: str) -> str:
    """``unet.….attn1`` of a key in diffusers' or in Stability's spelling."""
    if (known := _list_attentions().get(key)) is not None:
        return known  # the general parser takes 0.1 s for each
    try:
        return parse_kohya_stem(f"{key}_to_q").removesuffix(".to_q")
    except InvalidLoraFileError as error:
        raise ModelLoadError(
            f"hyper_lora_modules.json names {key!r}, which is no attention of a Stable Diffusion "
            "UNet: fetch it again"
        ) from error


def _parse_sizes(key: str, sizes: object) -> tuple[int, int]:
    """Width of the attention and of its keys' input."""
    try:
        hidden_size = int(sizes["hidden_size"])  # type: ignore[index]
        return hidden_size, int(sizes.get("cross_attention_dim") or hidden_size)  # type: ignore[attr-defined]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelLoadError(
            f"hyper_lora_modules.json has no sizes of {key!r}: fetch it again"
        ) from error
