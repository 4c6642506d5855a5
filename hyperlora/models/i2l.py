"""The i2L decoder (Image-to-LoRA, DiffSynth-Studio): image embeddings to LoRA factors.

For each target module, two linear bottlenecks without bias or activation:

    A [4, in]  = reshape(O_a (I_a x + b))         I [c, 5632], O_a [4 in, c]
    B [out, 4] = reshape(O_b (I_b x + b))         O_b [4 out, c]

x is the SigLIP2 embedding (1536) and the DINOv3 class token (4096) of one image. b is zero, or of
the tokens t [L, 3584] that a vision-language model makes of the image:

    b = R_out flatten(R_in (0.05 t))              R_in [m, 3584], R_out [c, L m], one per group

Several images: the ranks are joined, and A is divided by their number. Released files hold up to
16 GB, so tensors are read one by one, when they are needed.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from torch import Tensor
from torch.nn import functional as F

from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.tensor_reader import Shape, TensorReader

RANK_PER_IMAGE: Final = 4
EMBEDDING_DIM: Final = 1536 + 4096
"""SigLIP2's pooled embedding, then DINOv3's class token."""
TOKEN_DIM: Final = 3584
"""Width of Qwen2.5-VL's hidden states."""
_TOKEN_SCALE: Final = 0.05
_COMPONENT: Final = "transformer"

_Z_IMAGE_GROUPS: Final = (
    ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
    ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)
_QWEN_GROUPS: Final = (
    ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    ("img_mlp.net.2", "img_mod.1"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ("txt_mlp.net.2", "txt_mod.1"),
)
_Z_IMAGE_ORDER: Final = tuple(name for group in _Z_IMAGE_GROUPS for name in group)
_QWEN_ORDER: Final = (
    *("img_mod.1", "attn.to_q", "attn.to_k", "attn.to_v"),
    *("attn.add_k_proj", "attn.add_v_proj", "attn.add_q_proj", "attn.to_out.0", "attn.to_add_out"),
    *("img_mlp.net.2", "txt_mod.1", "txt_mlp.net.2"),
)
"""Targets of a block in the order of the base's modules, so that LoRAs of presets combine."""


@dataclass(frozen=True)
class I2lFamily:
    """Which blocks of a base get LoRAs, and where their tensors are.

    Attributes:
        stacks: Prefix of the tensors, then path of the blocks in the base, in the base's order.
        groups: The targets in a block. The tensors of group g and block b are
            ``blocks.{g * num_blocks + b}``.
        order: All targets in a block, in the base's order.
    """

    stacks: tuple[tuple[str, str], ...]
    groups: tuple[tuple[str, ...], ...]
    order: tuple[str, ...]


Z_IMAGE: Final = I2lFamily(
    (
        ("noise_refiner_lora.", "noise_refiner"),
        ("context_refiner_lora.", "context_refiner"),
        ("layers_lora.", "layers"),
    ),
    _Z_IMAGE_GROUPS,
    _Z_IMAGE_ORDER,
)
QWEN_IMAGE: Final = I2lFamily((("", "transformer_blocks"),), _QWEN_GROUPS, _QWEN_ORDER)


@dataclass(frozen=True)
class I2lConfig:
    """Sizes of an i2L decoder.

    Attributes:
        family: Blocks and targets.
        num_blocks: Blocks of each stack of the family.
        target_sizes: In and out features by target.
        bottleneck_dim: c.
        num_tokens: L, the tokens per image; 0 for a decoder of embeddings alone.
        token_bottleneck_dim: m; 0 likewise.
        embedding_dim: Width of x.
    """

    family: I2lFamily
    num_blocks: tuple[int, ...]
    target_sizes: Mapping[str, tuple[int, int]]
    bottleneck_dim: int
    num_tokens: int = 0
    token_bottleneck_dim: int = 0
    embedding_dim: int = EMBEDDING_DIM

    @cached_property
    def tensor_shapes(self) -> dict[str, Shape]:
        """Names and shapes of all tensors."""
        c, rank = self.bottleneck_dim, RANK_PER_IMAGE
        shapes: dict[str, Shape] = {}
        for (prefix, _), num_blocks in zip(self.family.stacks, self.num_blocks, strict=True):
            for g, group in enumerate(self.family.groups):
                for b in range(num_blocks):
                    block = f"{prefix}blocks.{g * num_blocks + b}"
                    for j, target in enumerate(group):
                        for name, size in zip("ab", self.target_sizes[target], strict=True):
                            proj = f"{block}.layers.{j}.proj_{name}"
                            shapes[f"{proj}.proj_in.weight"] = (c, self.embedding_dim)
                            shapes[f"{proj}.proj_out.weight"] = (rank * size, c)
                    if self.num_tokens:
                        m = self.token_bottleneck_dim
                        residual = f"{block}.proj_residual"
                        shapes[f"{residual}.proj_in.weight"] = (m, TOKEN_DIM)
                        shapes[f"{residual}.proj_out.weight"] = (c, self.num_tokens * m)
        return shapes

    def make_layout(self, num_images: int, base: str) -> LoraLayout:
        """Make the layout of the LoRA of several images.

        Args:
            num_images: Images; each adds ``RANK_PER_IMAGE`` to the rank.
            base: Id of the base.

        Returns:
            The layout, in the order of the base's modules.
        """
        targets = tuple(
            TargetModule(f"{_COMPONENT}.{path}.{b}.{target}", *self.target_sizes[target])
            for (_, path), num_blocks in zip(self.family.stacks, self.num_blocks, strict=True)
            for b in range(num_blocks)
            for target in self.family.order
        )
        return LoraLayout(targets, RANK_PER_IMAGE * num_images, base)


def make_z_image_config(
    dim: int, hidden_dim: int, num_layers: int, num_refiner_layers: int, bottleneck_dim: int
) -> I2lConfig:
    """Make the sizes of a decoder for Z-Image; released are 3840, 10240, 30, 2 and 128.

    Args:
        dim: Width of the base.
        hidden_dim: Width of its feed-forward layers.
        num_layers: Its layers.
        num_refiner_layers: Layers of each of its two refiners.
        bottleneck_dim: c.

    Returns:
        The sizes.
    """
    sizes = dict.fromkeys(_Z_IMAGE_ORDER, (dim, dim))
    sizes |= dict.fromkeys(("feed_forward.w1", "feed_forward.w3"), (dim, hidden_dim))
    sizes["feed_forward.w2"] = (hidden_dim, dim)
    num_blocks = (num_refiner_layers, num_refiner_layers, num_layers)
    return I2lConfig(Z_IMAGE, num_blocks, sizes, bottleneck_dim)


def make_qwen_image_config(
    dim: int,
    num_layers: int,
    bottleneck_dim: int,
    num_tokens: int = 0,
    token_bottleneck_dim: int = 0,
) -> I2lConfig:
    """Make the sizes of a decoder for Qwen-Image.

    Args:
        dim: Width of the base, 3072.
        num_layers: Its layers, 60.
        bottleneck_dim: c; 64 of Style, 128 of Coarse and Fine.
        num_tokens: L; 71 of Coarse, 1376 of Fine, 0 of Style.
        token_bottleneck_dim: m; 1024 of Coarse, 64 of Fine, 0 of Style.

    Returns:
        The sizes.
    """
    sizes = dict.fromkeys(_QWEN_ORDER, (dim, dim))
    sizes |= dict.fromkeys(("img_mlp.net.2", "txt_mlp.net.2"), (4 * dim, dim))
    sizes |= dict.fromkeys(("img_mod.1", "txt_mod.1"), (dim, 6 * dim))
    return I2lConfig(
        QWEN_IMAGE, (num_layers,), sizes, bottleneck_dim, num_tokens, token_bottleneck_dim
    )


def infer_i2l_config(shapes: Mapping[str, Shape], file_name: str) -> I2lConfig:
    """Infer the sizes of a decoder from the names and shapes of its tensors.

    Args:
        shapes: Shapes by name.
        file_name: The name of the file in error messages.

    Returns:
        The sizes, whose ``tensor_shapes`` equal ``shapes``.

    Raises:
        ModelLoadError: The tensors are not those of an i2L decoder.
    """
    family = Z_IMAGE if any(name.startswith("layers_lora.") for name in shapes) else QWEN_IMAGE
    num_groups = len(family.groups)
    block_ids = [
        {match[1] for name in shapes if (match := re.match(rf"{prefix}blocks\.(\d+)\.", name))}
        for prefix, _ in family.stacks
    ]
    num_blocks = tuple(len(ids) // num_groups for ids in block_ids)
    try:
        first_prefix, first_blocks = family.stacks[0][0], num_blocks[0]
        sizes = {
            target: (
                shapes[f"{layer}.proj_a.proj_out.weight"][0] // RANK_PER_IMAGE,
                shapes[f"{layer}.proj_b.proj_out.weight"][0] // RANK_PER_IMAGE,
            )
            for g, group in enumerate(family.groups)
            for j, target in enumerate(group)
            for layer in [f"{first_prefix}blocks.{g * first_blocks}.layers.{j}"]
        }
        block = f"{first_prefix}blocks.0"
        bottleneck_dim, embedding_dim = shapes[f"{block}.layers.0.proj_a.proj_in.weight"]
        num_tokens = token_bottleneck_dim = 0
        if f"{block}.proj_residual.proj_in.weight" in shapes:
            token_bottleneck_dim = shapes[f"{block}.proj_residual.proj_in.weight"][0]
            num_features = shapes[f"{block}.proj_residual.proj_out.weight"][1]
            num_tokens = num_features // token_bottleneck_dim
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ModelLoadError(
            f"{file_name} is no i2L network (v1): it lacks the tensors of one ({error}); give the "
            "network's own file"
        ) from error
    config = I2lConfig(
        family,
        num_blocks,
        sizes,
        bottleneck_dim,
        num_tokens,
        token_bottleneck_dim,
        embedding_dim,
    )
    expected = config.tensor_shapes
    names = expected.keys() | shapes.keys()
    if different := sorted(name for name in names if expected.get(name) != shapes.get(name)):
        name = different[0]
        raise ModelLoadError(
            f"{file_name} is no i2L network (v1): {len(different)} tensors differ, e.g. {name} is "
            f"{shapes.get(name, 'missing')}, {expected.get(name, 'none')} expected; give the "
            "network's own file"
        )
    return config


def compute_shape_digest(shapes: Mapping[str, Sequence[int]]) -> str:
    """Compute the MD5 of names and shapes, by which DiffSynth's registry tells releases apart.

    For each tensor the sorted, comma-joined list holds ``name:d0_d1_...`` and ``name``.

    Args:
        shapes: Shapes by name.

    Returns:
        32 hexadecimal digits.
    """
    items = [f"{name}:{'_'.join(map(str, shape))}" for name, shape in shapes.items()]
    text = ",".join(sorted([*items, *shapes]))
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def decode_i2l(
    config: I2lConfig,
    read_tensor: TensorReader,
    embeddings: Tensor,
    base: str,
    tokens: Tensor | None = None,
) -> LoraWeights:
    """Decode the LoRA of one or several images.

    Args:
        config: Sizes of the decoder.
        read_tensor: Reads its tensors, of any precision; the computation is in float32.
        embeddings: [images, embedding_dim].
        base: Id of the base.
        tokens: [images, num_tokens, 3584], for a decoder with tokens.

    Returns:
        One LoRA without batch axis, of rank 4 per image.

    Raises:
        InvalidArgumentError: The decoder needs tokens and got none, or the reverse.
    """
    if (tokens is not None) != bool(config.num_tokens):
        raise InvalidArgumentError(
            f"the i2L network takes {config.num_tokens} tokens per image, "
            f"{0 if tokens is None else tokens.shape[1]} given"
        )
    num_images = len(embeddings)
    embeddings = embeddings.float()
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for a, b in _decode_targets(config, read_tensor, embeddings, tokens):
        # a [n, 4 in], b [n, out 4]
        down = a.unflatten(-1, (RANK_PER_IMAGE, -1)).flatten(0, 1)  # [4 n, in]
        up = b.unflatten(-1, (-1, RANK_PER_IMAGE)).movedim(0, 1).flatten(1)  # [out, 4 n]
        downs.append(down / num_images)
        ups.append(up)
    return LoraWeights(config.make_layout(num_images, base), tuple(downs), tuple(ups))


def _decode_targets(
    config: I2lConfig, read_tensor: TensorReader, embeddings: Tensor, tokens: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the outputs [n, 4 in] and [n, 4 out] of each target, in the order of the layout."""
    places = {
        target: (g, j)
        for g, group in enumerate(config.family.groups)
        for j, target in enumerate(group)
    }
    for (prefix, _), num_blocks in zip(config.family.stacks, config.num_blocks, strict=True):
        for b in range(num_blocks):
            blocks = [
                f"{prefix}blocks.{g * num_blocks + b}" for g in range(len(config.family.groups))
            ]
            biases = [_compute_bias(block, read_tensor, tokens) for block in blocks]
            for target in config.family.order:
                g, j = places[target]
                layer = f"{blocks[g]}.layers.{j}"
                a, b_factor = (
                    _project(f"{layer}.proj_{name}", read_tensor, embeddings, biases[g])
                    for name in "ab"
                )
                yield a, b_factor


def _compute_bias(block: str, read_tensor: TensorReader, tokens: Tensor | None) -> Tensor | None:
    """R_out flatten(R_in (0.05 t)), [n, c]; None without tokens."""
    if tokens is None:
        return None
    proj_in, proj_out = (
        read_tensor(f"{block}.proj_residual.{name}.weight").float()
        for name in ("proj_in", "proj_out")
    )
    features = F.linear(_TOKEN_SCALE * tokens.float(), proj_in)  # [n, L, m]
    return F.linear(features.flatten(1), proj_out)  # [n, c]


def _project(
    name: str, read_tensor: TensorReader, embeddings: Tensor, bias: Tensor | None
) -> Tensor:
    """O (I x + b), [n, rows of O]."""
    hidden = F.linear(embeddings, read_tensor(f"{name}.proj_in.weight").float())  # [n, c]
    if bias is not None:
        hidden = hidden + bias
    return F.linear(hidden, read_tensor(f"{name}.proj_out.weight").float())
