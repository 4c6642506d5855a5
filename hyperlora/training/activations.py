"""Estimate the memory of activations: a forward pass without numbers counts what backward needs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hyperlora.diffusion.conditions import Conditions
from hyperlora.diffusion.families.base import PipelineFamily
from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.lora.layout import LoraLayout
from hyperlora.lora.weights import LoraWeights

if TYPE_CHECKING:
    from diffusers import ModelMixin

_P = ParamSpec("_P")
_T = TypeVar("_T")
_CHECKPOINT_ATTRIBUTE: Final = "_gradient_checkpointing_func"
"""Where blocks of diffusers keep their checkpoint function."""


@dataclass(frozen=True)
class _DenoiserShapes:
    """How the inputs of a class of denoisers follow from its configuration.

    Attributes:
        latent_channels: Configuration to channels of the latents.
        text_width: Key of the width of prompt embeddings.
        num_text_tokens: Tokens of a prompt: as many as the pipeline pads to, or those of a long
            caption where it does not pad.
        pooled_width: Configuration to the width of pooled embeddings; None without such.
        has_mask: Whether prompts have a mask.
        patch: Latent pixels of the VAE along a side of one latent pixel here.
    """

    latent_channels: Callable[[Any], int]
    text_width: str
    num_text_tokens: int
    pooled_width: Callable[[Any], int | None] = lambda config: None
    has_mask: bool = False
    patch: int = 1


def _get_unet_pooled_width(config: Any) -> int | None:  # noqa: ANN401 - diffusers' FrozenDict
    if config.addition_embed_type != "text_time":
        return None
    # six numbers of sizes and crops stand beside the pooled embedding (SDXL)
    return int(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)


_SHAPES: Final = {
    "UNet2DConditionModel": _DenoiserShapes(
        lambda config: config.out_channels, "cross_attention_dim", 77, _get_unet_pooled_width
    ),
    "SD3Transformer2DModel": _DenoiserShapes(
        lambda config: config.in_channels,
        "joint_attention_dim",
        333,
        lambda config: config.pooled_projection_dim,
    ),
    "FluxTransformer2DModel": _DenoiserShapes(
        lambda config: config.in_channels // 4,
        "joint_attention_dim",
        512,
        lambda config: config.pooled_projection_dim,
    ),
    "Flux2Transformer2DModel": _DenoiserShapes(
        lambda config: config.in_channels, "joint_attention_dim", 512, patch=2
    ),
    "ZImageTransformer2DModel": _DenoiserShapes(
        lambda config: config.in_channels, "cap_feat_dim", 128, has_mask=True
    ),
    "QwenImageTransformer2DModel": _DenoiserShapes(
        lambda config: config.in_channels // 4, "joint_attention_dim", 128, has_mask=True
    ),
}
"""By the class of the denoiser."""


def make_meta_denoiser(denoiser: "ModelMixin") -> "ModelMixin":
    """Make a denoiser of the same configuration and dtype, without numbers.

    Args:
        denoiser: Of diffusers.

    Returns:
        A frozen module on the meta device.
    """
    with torch.device("meta"):
        copy = type(denoiser).from_config(denoiser.config)
    for parameter, original in zip(copy.parameters(), denoiser.parameters(), strict=True):
        parameter.data = parameter.data.to(original.dtype)
    return copy.requires_grad_(False)


def estimate_activation_bytes(
    family: PipelineFamily,
    denoiser: "ModelMixin",
    layout: LoraLayout,
    num_samples: int,
    resolution: int,
    use_checkpointing: bool,
) -> int | None:
    """Estimate the bytes of one forward pass of a denoiser with LoRAs that its backward pass needs.

    Attention counts as that of flash kernels. With gradient checkpointing, these are the inputs of
    all blocks and the largest block.

    Args:
        family: Adapter of the pipeline.
        denoiser: On the meta device, in the precision of the training; it is changed.
        layout: Of the LoRAs, one for each sample.
        num_samples: Targets in one batch.
        resolution: Side of the target images in pixels.
        use_checkpointing: Whether the denoiser recomputes its blocks in the backward pass.

    Returns:
        Bytes; None for a class of denoisers whose inputs are not known.
    """
    shapes = _SHAPES.get(type(denoiser).__name__)
    if shapes is None:
        return None
    if use_checkpointing:
        denoiser.enable_gradient_checkpointing()
    denoiser.train(use_checkpointing)
    side = resolution // (family.pipeline.vae_scale_factor * shapes.patch)
    channels = shapes.latent_channels(denoiser.config)
    latents = torch.empty(num_samples, channels, side, side, device="meta")
    is_flow_matching = not type(denoiser).__name__.startswith("UNet")
    dtype = torch.float32 if is_flow_matching else torch.int64
    timesteps = torch.empty(num_samples, dtype=dtype, device="meta")
    targets = tuple(t for t in layout.targets if t.component == family.denoiser_name)
    weights = _make_meta_loras(replace(layout, targets=targets), num_samples)
    owned = [*denoiser.parameters(), *denoiser.buffers(), *weights.down, *weights.up]
    counter = StorageCounter(owned)
    with (
        FlashAttentionMode(),
        saved_tensors_hooks(counter.pack, lambda tensor: tensor),
        _count_checkpoints(denoiser, counter) if use_checkpointing else _yield_zero() as largest,
        inject_lora(denoiser, weights),
    ):
        conditions = _make_meta_conditions(family, denoiser, latents)
        family.predict(latents, timesteps, conditions, denoiser=denoiser)
    return counter.num_bytes + largest[0]


def estimate_text_activation_bytes(
    text_encoders: Mapping[str, nn.Module], layout: LoraLayout, num_samples: int
) -> int:
    """Estimate what the backward pass through adapted CLIP text encoders needs of the forward pass.

    Args:
        text_encoders: The adapted ones by component, on the meta device.
        layout: Of the LoRAs, one for each sample.
        num_samples: Prompts in one batch, each of full length.

    Returns:
        Bytes.
    """
    num_bytes = 0
    for name, module in text_encoders.items():
        targets = tuple(t for t in layout.targets if t.component == name)
        weights = _make_meta_loras(replace(layout, targets=targets), num_samples)
        counter = StorageCounter(
            [*module.parameters(), *module.buffers(), *weights.down, *weights.up]
        )
        config: Any = module.config
        shape = (num_samples, int(config.max_position_embeddings))
        tokens = torch.empty(shape, dtype=torch.long, device="meta")
        with (
            FlashAttentionMode(),
            saved_tensors_hooks(counter.pack, lambda tensor: tensor),
            inject_lora(module, weights),
        ):
            module(tokens, output_hidden_states=True)
        num_bytes += counter.num_bytes
    return num_bytes


def make_meta_text_encoder(text_encoder: nn.Module) -> nn.Module:
    """Make a text encoder of the same class, configuration and dtype, without numbers.

    Args:
        text_encoder: Of transformers.

    Returns:
        A frozen module on the meta device.
    """
    with torch.device("meta"):
        copy = type(text_encoder)(text_encoder.config)
    return copy.to(next(text_encoder.parameters()).dtype).requires_grad_(False)


def _make_meta_loras(layout: LoraLayout, num_loras: int) -> LoraWeights:
    def make(rows: int, columns: int) -> Tensor:
        """Make a factor of each LoRA."""
        return torch.empty(num_loras, rows, columns, device="meta", requires_grad=True)

    return LoraWeights(
        layout,
        tuple(make(layout.rank, target.in_features) for target in layout.targets),
        tuple(make(target.out_features, layout.rank) for target in layout.targets),
    )


def _make_meta_conditions(
    family: PipelineFamily, denoiser: "ModelMixin", latents: Tensor
) -> Conditions:
    """Make conditions as ``encode_prompts`` would return them."""
    config, dtype = denoiser.config, denoiser.dtype
    shapes, n = _SHAPES[type(denoiser).__name__], len(latents)
    num_tokens = shapes.num_text_tokens
    if family.encodes_images_in_prompts:
        # Qwen2.5-VL has one token for 28 x 28 pixels
        num_tokens += getattr(family, "text_encoder_area", 0) // 28**2
    width = config[shapes.text_width]
    conditions: Conditions = {
        "prompt_embeds": torch.empty(n, num_tokens, width, device="meta", dtype=dtype)
    }
    if shapes.has_mask:  # with numbers: families select tokens by it
        conditions["prompt_embeds_mask"] = torch.ones(n, num_tokens, dtype=torch.bool)
    if (pooled_width := shapes.pooled_width(config)) is not None:
        conditions["pooled_prompt_embeds"] = torch.empty(
            n, pooled_width, device="meta", dtype=dtype
        )
    if family.edits_images:
        conditions["image_latents"] = latents.to(dtype)
    return conditions


class StorageCounter:
    """Bytes of the storages of tensors, each storage once.

    Args:
        owned: Tensors that are there anyway and do not count.
    """

    def __init__(self, owned: Iterable[Tensor]) -> None:
        self.num_bytes = 0
        self._storages = {_identify_storage(tensor): tensor for tensor in owned}

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves."""
        key = _identify_storage(tensor)
        if key not in self._storages:
            self._storages[key] = tensor  # kept, so that no other storage gets its address
            self.num_bytes += tensor.untyped_storage().nbytes()
        return tensor

    def fork(self) -> "StorageCounter":
        """Make a counter of what comes on top."""
        return StorageCounter(self._storages.values())


def _identify_storage(tensor: Tensor) -> int:
    """Return a number that tells the storages of meta tensors apart, which have no address."""
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _yield_zero() -> Iterator[list[int]]:
    yield [0]


@contextmanager
def _count_checkpoints(denoiser: nn.Module, counter: StorageCounter) -> Iterator[list[int]]:
    """Count the inputs of checkpointed blocks; yield the bytes of the largest block in a list."""
    largest = [0]

    def run_checkpoint(block: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run a block, whose inputs are kept."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                counter.pack(value)
        inner = counter.fork()
        with saved_tensors_hooks(inner.pack, lambda tensor: tensor):
            output = block(*args, **kwargs)
        largest[0] = max(largest[0], inner.num_bytes)
        return output

    for module in denoiser.modules():
        if getattr(module, "gradient_checkpointing", False):
            setattr(module, _CHECKPOINT_ATTRIBUTE, run_checkpoint)
    yield largest


class _FlashAttention(torch.autograd.Function):
    """Attention that saves what a flash kernel saves: its inputs and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ANN401
        """Save the inputs and an output of their shape."""
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output


class FlashAttentionMode(TorchFunctionMode):
    """Replaces ``scaled_dot_product_attention``, which on meta tensors saves all its scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Call a function of torch, or the replacement."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        inputs = [*args[:3], *(kwargs[name] for name in names[len(args) :])]
        return _FlashAttention.apply(*inputs)
