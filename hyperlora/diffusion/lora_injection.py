"""``inject_lora``: a frozen model computes with one LoRA per sample, differentiably in the LoRA.

    y = W x + b + up (down x)

Forward hooks add the last term to the output of each target module: one batched product, without a
copy of W.

Shapes in comments: B = repeats * k samples for k LoRAs, r the rank, in and out the features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Final, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from hyperlora.compute import disable_autocast
from hyperlora.errors import InvalidArgumentError, LayoutMismatchError
from hyperlora.lora.blocks import select_blocks
from hyperlora.lora.layout import (
    COMPILED_CHILD,
    TargetModule,
    describe_other_layer,
    get_base_layer,
    list_layers,
    make_target,
)
from hyperlora.lora.weights import LoraWeights

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from hyperlora.diffusion.families.base import PipelineFamily

_P = ParamSpec("_P")
_T = TypeVar("_T")
_CHECKPOINT_ATTRIBUTE: Final = "_gradient_checkpointing_func"
"""Where blocks of diffusers and transformers keep their checkpoint function."""
_FUSED_PROJECTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""diffusers' fused projections of an attention, and those that they replace."""
_ForwardHook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


class _CheckpointFunction(Protocol):
    """diffusers' gradient checkpointing: calls a block with arguments, and again in backward."""

    def __call__(self, block: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T: ...


@contextmanager
def inject_lora(model: nn.Module | Mapping[str, nn.Module], weights: LoraWeights) -> Iterator[None]:
    """Add LoRAs to every forward pass of a model while the context is open.

    Contexts nest, and their LoRAs add up. Gradient checkpointing recomputes with the same LoRAs,
    also after the context has closed. A compiled model runs uncompiled meanwhile.

    Args:
        model: The one component that the LoRA adapts, or a mapping of component names (``unet``,
            ``text_encoder``) to modules.
        weights: Without a batch axis, one LoRA for all samples. With the batch axis [k], a forward
            pass of a multiple of k samples uses LoRA i mod k for sample i, as the doubled batch of
            classifier-free guidance needs.

    Raises:
        LayoutMismatchError: If a target module is missing or has another shape, if the LoRA has
            more than one batch axis, or if a batch is no multiple of k.
        InvalidArgumentError: If a target module is fused with others and therefore never runs.
    """
    if len(weights.batch_shape) > 1:
        raise LayoutMismatchError(
            f"one batch axis expected, the LoRA has {len(weights.batch_shape)}: "
            "flatten or index it first"
        )
    if isinstance(model, nn.Module):
        component, *other_components = weights.layout.components
        if other_components:
            raise LayoutMismatchError(
                f"the LoRA covers {', '.join(weights.layout.components)}: pass a mapping of these"
            )
        model = {component: model}
    injection = _LoraInjection(model, weights)
    # W stays untouched, so leaving the context restores the base exactly, also after an error
    with ExitStack() as stack:
        stack.enter_context(injection.register_hooks())
        for module in model.values():
            stack.enter_context(_intercept_checkpointing(module, injection))
            stack.enter_context(pause_compilation(module))
        yield


@contextmanager
def pause_compilation(module: nn.Module) -> Iterator[None]:
    """Run all compiled functions uncompiled within a ``with`` block, if a module is compiled.

    Compiled code checks no hooks: it would run without the LoRA, and say nothing.

    Args:
        module: A denoiser or text encoder, as a pipeline holds it.

    Yields:
        Nothing.
    """
    with torch.compiler.set_stance("force_eager") if _has_compiled_part(module) else nullcontext():
        yield


def _has_compiled_part(module: nn.Module) -> bool:
    """Whether torch.compile has wrapped a module or a part of it, or its forward method."""
    return any(
        part._compiled_call_impl is not None  # of ``module.compile()``
        or COMPILED_CHILD in part._modules  # of ``torch.compile(module)``
        or hasattr(part.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for part in module.modules()
    )


class _LoraInjection:
    """Forward hooks on all target modules, registered once however often they are entered.

    Args:
        components: Modules by component name.
        weights: The LoRAs to inject.
    """

    def __init__(self, components: Mapping[str, nn.Module], weights: LoraWeights) -> None:
        self.depth = 0
        self.handles: list[RemovableHandle] = []
        self.hooks: list[tuple[nn.Module, _ForwardHook]] = []
        # all shapes are checked here, before the first hook: a context opens whole or not at all
        layers = {name: dict(list_layers(module)) for name, module in components.items()}
        fused_layers = {
            layer for module in components.values() for layer in _list_fused_layers(module)
        }
        layout = weights.layout
        for target, down, up in zip(layout.targets, weights.down, weights.up, strict=True):
            layer = layers.get(target.component, {}).get(target.path)
            if layer is None:
                raise LayoutMismatchError(
                    describe_other_layer(components, target.name)
                    or f"the base has no target module {target.name}: "
                    f"the LoRA ({layout.base}) is not for it"
                )
            if layer in fused_layers:
                raise InvalidArgumentError(
                    f"target module {target.name} is fused with others and never runs: call "
                    "unfuse_qkv_projections on the pipeline before it samples with a LoRA"
                )
            # a wrapper of PEFT adds its own LoRA before the hook adds this one
            base_layer = get_base_layer(layer)
            _check_shape(target, base_layer)
            self.hooks.append((layer, _make_hook(base_layer, target, down, up)))

    @contextmanager
    def register_hooks(self) -> Iterator[None]:
        """Keep the hooks registered while at least one context is open."""
        # Backward may rerun a checkpointed block while the context is still open: a second set of
        # hooks would add up (down x) twice.
        if self.depth == 0:
            self.handles = [layer.register_forward_hook(hook) for layer, hook in self.hooks]
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                for handle in self.handles:
                    handle.remove()


def _check_shape(target: TargetModule, layer: nn.Module) -> None:
    """Raise ``LayoutMismatchError`` unless the layer has the target's features."""
    layer_target = make_target(target.name, layer)
    shape = layer_target.in_features, layer_target.out_features
    expected_shape = target.in_features, target.out_features
    if shape != expected_shape:
        raise LayoutMismatchError(
            f"target module {target.name} is {shape} in the base, {expected_shape} in the LoRA"
        )


def _list_fused_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Iterate over projections that diffusers' ``fuse_qkv_projections`` has put out of use."""
    for attention in module.modules():
        if not getattr(attention, "fused_projections", False):
            continue
        processor_name = type(getattr(attention, "processor", None)).__name__
        if type(attention).__name__ == "Attention" and not processor_name.startswith("Fused"):
            continue  # unfusing such an attention changes its processor alone
        for fused_name, names in _FUSED_PROJECTIONS.items():
            if hasattr(attention, fused_name):
                yield from (getattr(attention, name) for name in names)


def _make_hook(layer: nn.Module, target: TargetModule, down: Tensor, up: Tensor) -> _ForwardHook:
    """Make the hook that adds up (down x) to the output of one layer, or of its wrapper."""

    def forward_hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add up (down x); ``inputs`` starts with x."""
        x = inputs[0]  # [B, ..., in], or [B, in_channels, h, w]
        # a cast inside the graph: gradients reach the LoRA in its own dtype
        x_down, x_up = down.to(x.device, x.dtype), up.to(x.device, x.dtype)
        # The tokens of a prompt differ by little: bfloat16 would round the differences away.
        precision_context = (
            disable_autocast(x.device) if target.is_text_projection else nullcontext()
        )
        with precision_context:
            lora_output = (
                _apply_conv_lora(layer, x, x_down, x_up)
                if isinstance(layer, nn.Conv2d)
                else _apply_linear_lora(x, x_down, x_up)
            )
        return output + lora_output.to(output.dtype)  # W x + b + up (down x)

    return forward_hook


def _apply_linear_lora(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Compute up (down x) for each sample.

    Args:
        x: [samples, ..., in_features].
        down: [rank, in_features] or [k, rank, in_features].
        up: [out_features, rank] or [k, out_features, rank].

    Returns:
        [samples, ..., out_features].
    """
    if down.ndim == 2:
        # down first: r (in + out) products per token; up @ down first would need in · out
        return F.linear(F.linear(x, down), up)  # [B, ..., out]
    num_repeats, num_loras = _split_batch(x, len(down))
    # axis 1 meets the batch axis of down [k, r, in]; -1 is all axes between, 1 where there is none
    grouped_x = x.reshape(num_repeats, num_loras, -1, x.shape[-1])  # [repeats, k, tokens, in]
    hidden = grouped_x @ down.mT  # [repeats, k, tokens, r]
    output = hidden @ up.mT  # [repeats, k, tokens, out]
    return output.reshape(*x.shape[:-1], up.shape[-2])  # [B, ..., out]


def _apply_conv_lora(layer: nn.Conv2d, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Compute LoCon: a convolution like the layer's own to ``rank`` channels, then a 1x1 one.

    Args:
        layer: The adapted layer, for kernel size, stride, padding and dilation.
        x: [samples, in_channels, h, w].
        down: [rank, in_channels * kernel_h * kernel_w] or with the batch axis [k].
        up: [out_channels, rank] or with the batch axis [k].

    Returns:
        [samples, out_channels, h_out, w_out].
    """
    # [r, in_channels, kh, kw], or [k * r, in_channels, kh, kw] with the batch axis
    kernel = down.reshape(-1, layer.in_channels, *layer.kernel_size)
    if down.ndim == 2:
        # [B, r, h_out, w_out]; stride and padding belong to down, so sizes match the layer's
        hidden = F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation)
        return F.conv2d(hidden, up[..., None, None])  # kernel [out, r, 1, 1]
    num_repeats, num_loras = _split_batch(x, len(down))
    # The k LoRAs become k channel groups of one convolution, since conv2d has one kernel for all
    # samples: [B, in_channels, h, w] to [repeats, k * in_channels, h, w].
    grouped_x = x.reshape(num_repeats, num_loras * x.shape[1], *x.shape[2:])
    hidden = F.conv2d(
        grouped_x, kernel, None, layer.stride, layer.padding, layer.dilation, groups=num_loras
    )  # [repeats, k * r, h_out, w_out]
    height, width = hidden.shape[-2:]
    # positions = h_out * w_out; the 1x1 convolution is a product with up at each of them
    hidden = hidden.reshape(num_repeats, num_loras, -1, height * width)
    output = up @ hidden  # [k, out, r] @ [repeats, k, r, positions] = [repeats, k, out, positions]
    return output.reshape(num_repeats * num_loras, -1, height, width)  # [B, out, h_out, w_out]


def _split_batch(x: Tensor, num_loras: int) -> tuple[int, int]:
    """Split the number of samples into (repeats, LoRAs): sample i uses LoRA i mod k."""
    if len(x) % num_loras:
        raise LayoutMismatchError(
            f"{len(x)} samples cannot share {num_loras} LoRAs: the batch must be a multiple"
        )
    # repeats come first: view(repeats, k) puts samples 0, k, 2 k, … of LoRA 0 into one column
    return len(x) // num_loras, num_loras


@contextmanager
def _intercept_checkpointing(module: nn.Module, injection: _LoraInjection) -> Iterator[None]:
    """Make gradient checkpointing run its blocks with the hooks, also when backward reruns them."""
    # A checkpointed block runs again in backward, perhaps after the context has closed. Without
    # hooks it would then compute the base alone, and gradients would be wrong without an error.
    original_functions: list[tuple[nn.Module, _CheckpointFunction]] = []
    for block in module.modules():
        checkpoint = getattr(block, _CHECKPOINT_ATTRIBUTE, None)
        if getattr(block, "gradient_checkpointing", False) and callable(checkpoint):
            original_functions.append((block, checkpoint))
            setattr(block, _CHECKPOINT_ATTRIBUTE, _wrap_checkpoint_fn(checkpoint, injection))
    try:
        yield
    finally:
        for block, checkpoint in original_functions:
            setattr(block, _CHECKPOINT_ATTRIBUTE, checkpoint)


def _wrap_checkpoint_fn(
    checkpoint: _CheckpointFunction, injection: _LoraInjection
) -> _CheckpointFunction:
    """Wrap a checkpoint function so that its block runs with the hooks registered."""

    def run_checkpoint(block: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run the block through the original function."""

        def run_block(*block_args: _P.args, **block_kwargs: _P.kwargs) -> _T:
            """Run the block with the hooks registered."""
            with injection.register_hooks():
                return block(*block_args, **block_kwargs)

        return checkpoint(run_block, *args, **kwargs)

    return run_checkpoint


def split_denoiser(family: "PipelineFamily", loras: Sequence[LoraWeights]) -> list[LoraWeights]:
    """Select the denoiser's parts of LoRAs.

    Args:
        family: Adapter of the pipeline.
        loras: Of any components.

    Returns:
        One LoRA of the denoiser for each, on its device and in its dtype: of zeros where a LoRA
        adapts text encoders alone. Empty if all of them do.
    """
    name = family.denoiser_name
    parts = [
        move_lora(select_blocks(lora, [name]), family.device, family.denoiser)
        if name in lora.layout.components
        else None
        for lora in loras
    ]
    zeros = next((part * 0.0 for part in parts if part is not None), None)
    return [zeros if part is None else part for part in parts] if zeros is not None else []


def split_text_encoders(
    pipe: "DiffusionPipeline", lora: LoraWeights, denoiser_name: str
) -> Iterator[tuple[nn.Module, LoraWeights]]:
    """Iterate over the text encoders that a LoRA adapts.

    Args:
        pipe: Pipeline that holds them.
        lora: Of any components.
        denoiser_name: Component to leave out, ``unet`` or ``transformer``.

    Yields:
        A text encoder and its part of the LoRA, on its device and in its dtype.

    Raises:
        LayoutMismatchError: If the pipeline lacks a component.
    """
    for component in lora.layout.components:
        if component == denoiser_name:
            continue
        module = getattr(pipe, component, None)
        if not isinstance(module, nn.Module):
            raise LayoutMismatchError(
                f"the LoRA changes {component}, which {type(pipe).__name__} lacks: use its own base"
            )
        yield module, move_lora(select_blocks(lora, [component]), pipe._execution_device, module)


def move_lora(lora: LoraWeights, device: torch.device, module: nn.Module) -> LoraWeights:
    """Move a LoRA to the device and precision in which a module computes.

    Args:
        lora: With or without a batch axis.
        device: Device of the pipeline, which an offloaded module leaves between its calls.
        module: With at least one parameter.

    Returns:
        The moved LoRA.
    """
    # weights of 8 bits are quantized or cast layer by layer, and computed with in another precision
    dtypes = (p.dtype for p in module.parameters() if p.is_floating_point() and p.itemsize > 1)
    dtype = next(dtypes, torch.float32)
    return lora.apply(lambda factor: factor.to(device, dtype))
