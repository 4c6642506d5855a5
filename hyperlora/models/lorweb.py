"""LoRWeB: a basis of LoRAs at every target, mixed by the embeddings of three images.

    q = [CLIP(a); CLIP(a'); CLIP(b)]                          a → a' is the edit, b the new input
    e = softmax((W_q q) Kᵀ / √k)                              one weight per basis LoRA
    ΔW x = Σ_n e_n (x A_n) B_n                                A_n [in, r], B_n [r, out]

This is exactly one LoRA of rank N r, with down = [A_1ᵀ; …; A_Nᵀ] and up = [e_1 B_1ᵀ … e_N B_Nᵀ].
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hyperlora.errors import ModelLoadError
from hyperlora.lora.factors import resize_factors
from hyperlora.lora.layout import LoraLayout, TargetModule
from hyperlora.lora.weights import LoraWeights
from hyperlora.models.tensor_reader import Shape, TensorReader

NUM_QUERY_IMAGES: Final = 3
_KEY: Final = re.compile(r"(?P<target>transformer\..+)\.(?:att_)?lora_(?P<tail>\w+(?:\.\w+)*)")
_BLOCK_NAMES: Final = ("transformer_blocks", "single_transformer_blocks")
_LAYER_NAMES: Final = (
    *("norm1.linear", "norm1_context.linear", "norm.linear", "proj_mlp", "proj_out"),
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)
"""Layers of a block in the order of ``FluxTransformer2DModel``."""


@dataclass(frozen=True)
class LorwebTarget:
    """The tensors of one adapted layer.

    Attributes:
        target: The layer.
        basis_down: Name of A [N, in, r].
        basis_up: Name of B [N, r, out].
        keys: Name of K [N, k].
        to_q: Name of W_q [k, 3 * embedding].
        rank: N r.
        embedding_dim: Of one image.
        alpha: Name of alpha; "" where the scale is 1.
    """

    target: TargetModule
    basis_down: str
    basis_up: str
    keys: str
    to_q: str
    rank: int
    embedding_dim: int
    alpha: str = ""


def list_lorweb_targets(shapes: Mapping[str, Shape], file_name: str) -> tuple[LorwebTarget, ...]:
    """Find the adapted layers by the names and shapes of tensors.

    Args:
        shapes: Shapes by name.
        file_name: The name of the file in error messages.

    Returns:
        The layers, in the order of the base's modules.

    Raises:
        ModelLoadError: The tensors are not those of a LoRWeB network.
    """
    tensor_names: dict[str, list[str]] = {}
    for name in shapes:
        match = _KEY.fullmatch(name)
        path = match["target"] if match else name.removesuffix(".alpha")
        if not match and path == name:
            raise ModelLoadError(
                f"{file_name} is no LoRWeB network: {name} is no tensor of one; give the "
                "network's own file"
            )
        tensor_names.setdefault(path, []).append(name)
    targets = [_make_target(path, names, shapes, file_name) for path, names in tensor_names.items()]
    if not targets or len({(t.rank, t.embedding_dim) for t in targets}) != 1:
        raise ModelLoadError(
            f"{file_name} is no LoRWeB network: its layers have different ranks, or there are "
            "none; give the network's own file"
        )
    return tuple(sorted(targets, key=lambda target: _make_sort_key(target.target)))


def mix_lorweb(
    targets: tuple[LorwebTarget, ...],
    read_tensor: TensorReader,
    embeddings: Tensor,
    base: str,
    rank: int | None = None,
) -> LoraWeights:
    """Mix the LoRA of one edit.

    Args:
        targets: The adapted layers.
        read_tensor: Reads a tensor, of any precision; the computation is in float32.
        embeddings: Of a, a' and b, [3, embedding], not normalized.
        base: Id of the base.
        rank: The rank after an SVD of each layer; None for the exact LoRA.

    Returns:
        One LoRA without batch axis.
    """
    query = embeddings.float().flatten()  # [3 * embedding]
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for target in targets:
        down, up = _mix_target(target, read_tensor, query)
        if rank is not None:
            down, up = resize_factors(down, up, rank)
        downs.append(down)
        ups.append(up)
    layout = LoraLayout(tuple(t.target for t in targets), rank or targets[0].rank, base)
    return LoraWeights(layout, tuple(downs), tuple(ups))


def _mix_target(
    target: LorwebTarget, read_tensor: TensorReader, query: Tensor
) -> tuple[Tensor, Tensor]:
    """Return down [N r, in] and up [out, N r]."""
    to_q, keys = read_tensor(target.to_q).float(), read_tensor(target.keys).float()
    scores = keys @ (to_q @ query) * keys.shape[1] ** -0.5  # [N]
    weights = torch.softmax(scores, 0)  # [N]
    basis_down = read_tensor(target.basis_down).float()  # [N, in, r]
    basis_up = read_tensor(target.basis_up).float()  # [N, r, out]
    if target.alpha:
        weights = weights * read_tensor(target.alpha).float() / basis_down.shape[2]
    down = basis_down.mT.flatten(0, 1)  # [N r, in]
    up = (weights[:, None, None] * basis_up).flatten(0, 1).mT  # [out, N r]
    return down, up.contiguous()


def _make_target(
    path: str, names: list[str], shapes: Mapping[str, Shape], file_name: str
) -> LorwebTarget:
    """Tell the four tensors of a layer apart by their shapes."""
    alpha = next((name for name in names if name.endswith("alpha")), "")
    tensors = {name: shapes[name] for name in names if name != alpha}
    cubes = [name for name, shape in tensors.items() if len(shape) == 3]
    matrices = [name for name, shape in tensors.items() if len(shape) == 2]
    if len(cubes) == len(matrices) == 2 and len(tensors) == 4:
        # the rank is less than any width, and k less than three embeddings
        basis_down, basis_up = sorted(cubes, key=lambda n: tensors[n][2] > tensors[n][1])
        keys, to_q = sorted(matrices, key=lambda n: tensors[n][1])
        (num_basis, in_features, rank), (num_ups, up_rank, out_features) = (
            tensors[basis_down],
            tensors[basis_up],
        )
        (num_keys, key_dim), (query_dim, width) = tensors[keys], tensors[to_q]
        is_consistent = (
            num_basis == num_ups == num_keys
            and rank == up_rank
            and key_dim == query_dim
            and width % NUM_QUERY_IMAGES == 0
        )
        if is_consistent:
            return LorwebTarget(
                TargetModule(path, in_features, out_features),
                *(basis_down, basis_up, keys, to_q),
                rank=num_basis * rank,
                embedding_dim=width // NUM_QUERY_IMAGES,
                alpha=alpha,
            )
    found = ", ".join(f"{name.removeprefix(path + '.')} {list(shapes[name])}" for name in names)
    raise ModelLoadError(
        f"{file_name} is no LoRWeB network: {path} has {found}, expected A [N, in, r], B [N, r, "
        "out], keys [N, k] and a query matrix [k, 3 d]; give the network's own file"
    )


def _make_sort_key(target: TargetModule) -> tuple[int, int, int]:
    """Stack, number and layer of a target in the base."""
    blocks, number, layer = (*target.path.split(".", 2), "", "")[:3]
    return (
        _BLOCK_NAMES.index(blocks) if blocks in _BLOCK_NAMES else len(_BLOCK_NAMES),
        int(number) if number.isdecimal() else 0,
        _LAYER_NAMES.index(layer) if layer in _LAYER_NAMES else len(_LAYER_NAMES),
    )
