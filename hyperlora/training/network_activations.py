"""Estimate the memory of activations of the network that is trained, and of an encoder with it."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.features import ImageFeatures
from hyperlora.models.hypernetwork import Hypernetwork
from hyperlora.models.pair_hypernetwork import PairHypernetwork
from hyperlora.training.activations import FlashAttentionMode, StorageCounter

_Module = TypeVar("_Module", bound=nn.Module)


def estimate_network_activation_bytes(
    encoder: nn.Module, network: nn.Module, num_subjects: int, num_views: int
) -> int | None:
    """Estimate the bytes of a forward pass from photos to LoRAs that its backward pass needs.

    They are counted in float32. Mixed precision saves about a fifth.

    Args:
        encoder: The image encoder, with or without numbers; its part counts if it is trained.
        network: A module that holds the network, with or without numbers.
        num_subjects: Subjects, or edits, in one batch.
        num_views: Photos, or pairs, of each.

    Returns:
        Bytes; None for an encoder that is part of the base, or an unknown network.
    """
    found = [m for m in network.modules() if isinstance(m, PairHypernetwork | Hypernetwork)]
    if not isinstance(encoder, TimmEncoder) or not found:
        return None
    meta_encoder, meta_network = make_meta_copy(encoder), make_meta_copy(found[0]).train()
    modules = (meta_encoder, meta_network)
    counter = StorageCounter(t for m in modules for t in (*m.parameters(), *m.buffers()))
    size = encoder.image_size
    images = torch.empty(num_subjects, num_views, 3, size, size, device="meta")
    num_images = 2 if isinstance(meta_network, PairHypernetwork) else 1
    with FlashAttentionMode():
        if any(p.requires_grad for p in encoder.parameters()):
            with saved_tensors_hooks(counter.pack, lambda tensor: tensor):
                features = [meta_encoder(images) for _ in range(num_images)]
        else:
            shape = meta_encoder(images[:1, :1]).tokens.shape[2:]
            tokens = torch.empty(num_subjects, num_views, *shape, device="meta")
            features = [ImageFeatures(tokens) for _ in range(num_images)]
        with saved_tensors_hooks(counter.pack, lambda tensor: tensor):
            meta_network(*features)
    return counter.num_bytes


def make_meta_copy(module: _Module) -> _Module:
    """Copy a module without the numbers of its parameters and buffers.

    Args:
        module: On any device.

    Returns:
        The copy, on the meta device.
    """
    memo: dict[int, Tensor] = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()
    }
    memo |= {id(b): b.detach().to("meta") for b in module.buffers()}
    return copy.deepcopy(module, memo)
