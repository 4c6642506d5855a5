"""``inject_lora``: a frozen model computes with one LoRA per sample, differentiably in the LoRA.

y = W x + b + up @ (down @ x)        one batched product per site, no copy of W
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.errors import LayoutMismatchError
from hyperlora.lora.blocks import select_blocks
from hyperlora.lora.layout import TargetModule
from hyperlora.lora.weights import LoraWeights


@contextmanager
def inject_lora(model: nn.Module | Mapping[str, nn.Module], weights: LoraWeights) -> Iterator[None]:
    """While open, every forward of ``target`` has ``weights`` added; contexts nest and their LoRAs add up.

    ``target`` is the one component of the layout, or a mapping of component names to modules. Weights without batch
    axis act on all samples; weights of batch n on a forward of k·n samples act as LoRA i mod n on sample i, which is
    what classifier-free guidance's doubled batch needs. Gradient checkpointing recomputes with the same weights, also
    after the context has closed.

    Raises ``LayoutMismatchError`` if a site is missing, of another shape, or the batch is no multiple of n.
    """
    if len(weights.batch_shape) > 1:
        raise LayoutMismatchError(
            f"one batch axis expected, the LoRA has {len(weights.batch_shape)}: flatten or index it first"
        )
    if isinstance(model, nn.Module):
        (component, *other_components) = weights.layout.components
        if other_components:
            raise LayoutMismatchError(
                f"the LoRA covers {', '.join(weights.layout.components)}: pass a mapping of these"
            )
        model = {component: model}
    injection = _LoraInjection(model, weights)
    with ExitStack() as stack:
        stack.enter_context(injection.register_hooks())
        for module in model.values():
            stack.enter_context(_intercept_checkpointing(module, injection))
        yield


class _LoraInjection:
    """Forward hooks on all sites, installed once however often it is entered."""

    def __init__(self, components: Mapping[str, nn.Module], weights: LoraWeights) -> None:
        self.depth = 0
        self.handles: list[Any] = []
        self.hooks: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        modules = {name: dict(module.named_modules()) for name, module in components.items()}
        for target_module, down, up in zip(
            weights.layout.targets, weights.down, weights.up, strict=True
        ):
            layer = modules.get(target_module.component, {}).get(target_module.path)
            if layer is None:
                raise LayoutMismatchError(
                    f"the base has no site {target_module.name}: the LoRA ({weights.layout.base}) is not for it"
                )
            self.hooks.append((layer, _make_hook(target_module, layer, down, up)))

    @contextmanager
    def register_hooks(self) -> Iterator[None]:
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


def _make_hook(
    target: TargetModule, layer: nn.Module, down: Tensor, up: Tensor
) -> Callable[..., Tensor]:
    shape = (
        (layer.weight[0].numel(), layer.weight.shape[0])
        if isinstance(layer, nn.Linear | nn.Conv2d)
        else None
    )
    if shape != (target.in_features, target.out_features):
        raise LayoutMismatchError(
            f"site {target.name} is {shape} in the base, {(target.in_features, target.out_features)} in the LoRA"
        )

    def forward_hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        d, u = down.to(x.device, x.dtype), up.to(x.device, x.dtype)
        # tokens of a text differ by little: in bfloat16 a LoRA could not tell them apart
        precision_context = (
            torch.autocast(x.device.type, enabled=False)
            if target.is_text_projection
            else nullcontext()
        )
        with precision_context:
            lora_output = (
                _apply_conv_lora(module, x, d, u, target)
                if isinstance(module, nn.Conv2d)
                else _apply_linear_lora(x, d, u)
            )
        return output + lora_output.to(output.dtype)

    return forward_hook


def _apply_linear_lora(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """x [samples, *, fan_in] -> [samples, *, fan_out]."""
    if down.ndim == 2:
        return F.linear(F.linear(x, down), up)
    n = len(down)
    grouped_x = x.reshape(*_split_batch(x, n), -1, x.shape[-1])  # [rounds, n, tokens, fan_in]
    return ((grouped_x @ down.mT) @ up.mT).reshape(*x.shape[:-1], up.shape[-2])


def _apply_conv_lora(
    layer: nn.Conv2d, x: Tensor, down: Tensor, up: Tensor, target: TargetModule
) -> Tensor:
    """LoCon: a convolution like the layer's own to ``rank`` channels, then 1x1; x [samples, channels, h, w]."""
    assert target.kernel_size is not None
    kernel_shape = (
        -1,
        target.in_features // (target.kernel_size[0] * target.kernel_size[1]),
        *target.kernel_size,
    )
    if down.ndim == 2:
        hidden = F.conv2d(
            x, down.reshape(kernel_shape), None, layer.stride, layer.padding, layer.dilation
        )
        return F.conv2d(hidden, up[..., None, None])
    num_repeats, n = _split_batch(x, len(down))
    grouped_x = x.reshape(
        num_repeats, n * x.shape[1], *x.shape[2:]
    )  # the n LoRAs side by side as channel groups
    hidden = F.conv2d(
        grouped_x,
        down.reshape(kernel_shape),
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        groups=n,
    )
    height, width = hidden.shape[-2:]
    hidden = hidden.reshape(num_repeats, n, -1, height * width)  # [rounds, n, rank, positions]
    return (up @ hidden).reshape(num_repeats * n, -1, height, width)


def _split_batch(x: Tensor, n: int) -> tuple[int, int]:
    if len(x) % n:
        raise LayoutMismatchError(
            f"{len(x)} samples cannot share {n} LoRAs: the batch must be a multiple"
        )
    return len(x) // n, n


@contextmanager
def _intercept_checkpointing(module: nn.Module, injection: _LoraInjection) -> Iterator[None]:
    """Make diffusers' gradient checkpointing run its blocks under ``injection``, also when backward recomputes them."""
    original_functions: list[tuple[Any, Callable[..., Any]]] = []
    block: Any
    for block in module.modules():
        checkpoint = getattr(block, "_gradient_checkpointing_func", None)
        if getattr(block, "gradient_checkpointing", False) and callable(checkpoint):
            original_functions.append((block, checkpoint))
            block._gradient_checkpointing_func = _wrap_checkpoint_fn(checkpoint, injection)
    try:
        yield
    finally:
        for block, checkpoint in original_functions:
            block._gradient_checkpointing_func = checkpoint


def _wrap_checkpoint_fn(
    checkpoint: Callable[..., Any], injection: _LoraInjection
) -> Callable[..., Any]:
    def run_checkpoint(block: Callable[..., Any], *args: Any) -> Any:
        def run_block(*block_args: Any) -> Any:
            with injection.register_hooks():
                return block(*block_args)

        return checkpoint(run_block, *args)

    return run_checkpoint


def split_denoiser(lora: LoraWeights, denoiser_name: str) -> LoraWeights:
    if denoiser_name not in lora.layout.components:
        raise LayoutMismatchError(
            f"the LoRA changes {', '.join(lora.layout.components)}, but nothing in the {denoiser_name}"
        )
    return (
        lora if lora.layout.components == (denoiser_name,) else select_blocks(lora, [denoiser_name])
    )


def split_text_encoders(
    pipe: Any, lora: LoraWeights, denoiser_name: str
) -> Iterator[tuple[nn.Module, LoraWeights]]:
    for component in lora.layout.components:
        if component == denoiser_name:
            continue
        module = getattr(pipe, component, None)
        if not isinstance(module, nn.Module):
            raise LayoutMismatchError(
                f"the LoRA changes {component}, which {type(pipe).__name__} lacks: use its own base"
            )
        yield module, move_to_module(select_blocks(lora, [component]), module)


def move_to_module(lora: LoraWeights, module: nn.Module) -> LoraWeights:
    reference = next(module.parameters())
    return lora.apply(lambda t: t.to(reference.device, reference.dtype))
