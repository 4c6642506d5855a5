"""``injected``: a frozen model computes with one LoRA per sample, differentiably in the LoRA.

y = W x + b + up @ (down @ x)        one batched product per site, no copy of W
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.errors import LayoutMismatch
from hyperlora.lora.blocks import part
from hyperlora.lora.layout import Site
from hyperlora.lora.weights import LoraWeights


@contextmanager
def injected(target: nn.Module | Mapping[str, nn.Module], weights: LoraWeights) -> Iterator[None]:
    """While open, every forward of ``target`` has ``weights`` added; contexts nest and their LoRAs add up.

    ``target`` is the one component of the layout, or a mapping of component names to modules. Weights without batch
    axis act on all samples; weights of batch n on a forward of k·n samples act as LoRA i mod n on sample i, which is
    what classifier-free guidance's doubled batch needs. Gradient checkpointing recomputes with the same weights, also
    after the context has closed.

    Raises ``LayoutMismatch`` if a site is missing, of another shape, or the batch is no multiple of n.
    """
    if len(weights.batch) > 1:
        raise LayoutMismatch(f"one batch axis expected, the LoRA has {len(weights.batch)}: flatten or index it first")
    if isinstance(target, nn.Module):
        (component, *more) = weights.layout.components
        if more:
            raise LayoutMismatch(f"the LoRA covers {', '.join(weights.layout.components)}: pass a mapping of these")
        target = {component: target}
    injection = _Injection(target, weights)
    with ExitStack() as stack:
        stack.enter_context(injection.active())
        for module in target.values():
            stack.enter_context(_checkpoints_recompute_with(module, injection))
        yield


class _Injection:
    """Forward hooks on all sites, installed once however often it is entered."""

    def __init__(self, target: Mapping[str, nn.Module], weights: LoraWeights) -> None:
        self.depth = 0
        self.handles: list[Any] = []
        self.hooks: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        modules = {name: dict(module.named_modules()) for name, module in target.items()}
        for site, down, up in zip(weights.layout.sites, weights.down, weights.up, strict=True):
            layer = modules.get(site.component, {}).get(site.path)
            if layer is None:
                raise LayoutMismatch(
                    f"the base has no site {site.name}: the LoRA ({weights.layout.base}) is not for it"
                )
            self.hooks.append((layer, _hook(site, layer, down, up)))

    @contextmanager
    def active(self) -> Iterator[None]:
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


def _hook(site: Site, layer: nn.Module, down: Tensor, up: Tensor) -> Callable[..., Tensor]:
    shape = (layer.weight[0].numel(), layer.weight.shape[0]) if isinstance(layer, nn.Linear | nn.Conv2d) else None
    if shape != (site.fan_in, site.fan_out):
        raise LayoutMismatch(f"site {site.name} is {shape} in the base, {(site.fan_in, site.fan_out)} in the LoRA")

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        d, u = down.to(x.device, x.dtype), up.to(x.device, x.dtype)
        # tokens of a text differ by little: in bfloat16 a LoRA could not tell them apart
        exact = torch.autocast(x.device.type, enabled=False) if site.reads_text else nullcontext()
        with exact:
            add = _conv(module, x, d, u, site) if isinstance(module, nn.Conv2d) else _linear(x, d, u)
        return output + add.to(output.dtype)

    return hook


def _linear(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """x [samples, *, fan_in] -> [samples, *, fan_out]."""
    if down.ndim == 2:
        return F.linear(F.linear(x, down), up)
    n = len(down)
    rows = x.reshape(*_rounds(x, n), -1, x.shape[-1])  # [rounds, n, tokens, fan_in]
    return ((rows @ down.mT) @ up.mT).reshape(*x.shape[:-1], up.shape[-2])


def _conv(layer: nn.Conv2d, x: Tensor, down: Tensor, up: Tensor, site: Site) -> Tensor:
    """LoCon: a convolution like the layer's own to ``rank`` channels, then 1x1; x [samples, channels, h, w]."""
    assert site.kernel is not None
    kernel = (-1, site.fan_in // (site.kernel[0] * site.kernel[1]), *site.kernel)
    if down.ndim == 2:
        low = F.conv2d(x, down.reshape(kernel), None, layer.stride, layer.padding, layer.dilation)
        return F.conv2d(low, up[..., None, None])
    rounds, n = _rounds(x, len(down))
    grouped = x.reshape(rounds, n * x.shape[1], *x.shape[2:])  # the n LoRAs side by side as channel groups
    low = F.conv2d(grouped, down.reshape(kernel), None, layer.stride, layer.padding, layer.dilation, groups=n)
    height, width = low.shape[-2:]
    low = low.reshape(rounds, n, -1, height * width)  # [rounds, n, rank, positions]
    return (up @ low).reshape(rounds * n, -1, height, width)


def _rounds(x: Tensor, n: int) -> tuple[int, int]:
    if len(x) % n:
        raise LayoutMismatch(f"{len(x)} samples cannot share {n} LoRAs: the batch must be a multiple")
    return len(x) // n, n


@contextmanager
def _checkpoints_recompute_with(module: nn.Module, injection: _Injection) -> Iterator[None]:
    """Make diffusers' gradient checkpointing run its blocks under ``injection``, also when backward recomputes them."""
    wrapped: list[tuple[Any, Callable[..., Any]]] = []
    block: Any
    for block in module.modules():
        checkpoint = getattr(block, "_gradient_checkpointing_func", None)
        if getattr(block, "gradient_checkpointing", False) and callable(checkpoint):
            wrapped.append((block, checkpoint))
            block._gradient_checkpointing_func = _wrap(checkpoint, injection)
    try:
        yield
    finally:
        for block, checkpoint in wrapped:
            block._gradient_checkpointing_func = checkpoint


def _wrap(checkpoint: Callable[..., Any], injection: _Injection) -> Callable[..., Any]:
    def run(block: Callable[..., Any], *args: Any) -> Any:
        def under_injection(*inner: Any) -> Any:
            with injection.active():
                return block(*inner)

        return checkpoint(under_injection, *args)

    return run


def denoiser_part(lora: LoraWeights, name: str) -> LoraWeights:
    if name not in lora.layout.components:
        raise LayoutMismatch(f"the LoRA changes {', '.join(lora.layout.components)}, but nothing in the {name}")
    return lora if lora.layout.components == (name,) else part(lora, [name])


def text_parts(pipe: Any, lora: LoraWeights, name: str) -> Iterator[tuple[nn.Module, LoraWeights]]:
    for component in lora.layout.components:
        if component == name:
            continue
        module = getattr(pipe, component, None)
        if not isinstance(module, nn.Module):
            raise LayoutMismatch(f"the LoRA changes {component}, which {type(pipe).__name__} lacks: use its own base")
        yield module, on_device(part(lora, [component]), module)


def on_device(lora: LoraWeights, module: nn.Module) -> LoraWeights:
    like = next(module.parameters())
    return lora.map(lambda t: t.to(like.device, like.dtype))
