"""``shard_base``: a frozen base whose weights are spread over the devices of a training (FSDP2)."""

from typing import Final

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hyperlora.diffusion.diffusion_base import DiffusionBase

_BLOCK_ATTRIBUTES: Final = ("_repeated_blocks", "_no_split_modules")
"""Where models of diffusers, then of transformers, name the classes of their blocks."""


def shard_base(base: DiffusionBase, device: torch.device) -> None:
    """Spread denoiser and text encoders over all devices, block by block.

    Before a block computes, its weights are gathered from all devices, and dropped afterwards. So
    each device holds 1 / n of the blocks and one whole block. All devices must call the denoiser
    equally often. The trained network is not part of the base, and ``ddp`` copies it.

    Args:
        base: On the CPU; its blocks move to ``device``.
        device: Of this process, whose process group is initialized.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in (base.denoiser, *base.family.text_encoders.values()):
        names = list_block_names(module)
        for block in [m for m in module.modules() if type(m).__name__ in names]:
            fully_shard(block, mesh=mesh)
    # the rest of the denoiser too, which lets it fetch the next block while one computes; text
    # encoders of transformers find their layers by the class that sharding would change
    fully_shard(base.denoiser, mesh=mesh)


def list_block_names(module: nn.Module) -> set[str]:
    """List the classes of the blocks that a model repeats; none if it does not name them."""
    for attribute in _BLOCK_ATTRIBUTES:
        if names := getattr(module, attribute, None):
            return set(names)
    return set()


def count_sharded_bytes(module: nn.Module, num_devices: int) -> int:
    """Count the bytes of a module on each device once its blocks are sharded.

    Args:
        module: Denoiser or text encoder, with or without numbers.
        num_devices: Devices.

    Returns:
        Bytes, without the one block that is gathered at a time.
    """
    names = list_block_names(module)
    blocks = [m for m in module.modules() if type(m).__name__ in names]
    # a set: CLIP names its embeddings too, and a block could hold another
    sharded = {p for block in blocks for p in block.parameters()}
    num_bytes = {True: 0, False: 0}
    for p in module.parameters():
        num_bytes[p in sharded] += p.numel() * p.element_size()
    return num_bytes[False] + -(-num_bytes[True] // num_devices)
