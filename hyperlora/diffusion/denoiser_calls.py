"""Calls of a pipeline's denoiser, caught while an ordinary pipeline runs: what composition and guidance stand on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hyperlora.diffusion.lora_injection import injected
from hyperlora.errors import BadRequest
from hyperlora.lora.weights import LoraWeights

_NO_BATCH = frozenset({"img_ids", "txt_ids", "image_rotary_emb", "img_shapes", "txt_seq_lens"})
"""Arguments of DiTs that describe positions, not samples."""


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """The component of a diffusers pipeline that denoises, by name. Raises ``BadRequest`` if it has none."""
    for name in ("unet", "transformer"):
        if isinstance(module := getattr(pipe, name, None), nn.Module):
            return name, module
    raise BadRequest(f"{type(pipe).__name__} has neither unet nor transformer: no LoRA can be composed on it")


@dataclass(frozen=True)
class Call:
    """One call of a denoiser. ``args`` and ``kwargs`` are what the pipeline gave; ``sample`` is the noisy latents,
    [samples, channels, h, w] or packed [samples, tokens, channels] (FLUX)."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def sample(self) -> Tensor:
        return self.args[0] if self.args else self.kwargs[self._sample_name]

    @property
    def timestep(self) -> float:
        given = self.args[1] if len(self.args) > 1 else self.kwargs["timestep"]
        return float(given.flatten()[0]) if isinstance(given, Tensor) else float(given)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the latents in positions (of packed ones, by their ids)."""
        if self.sample.ndim == 4:
            return self.sample.shape[-2], self.sample.shape[-1]
        ids = self.kwargs.get("img_ids")
        if not isinstance(ids, Tensor):
            raise BadRequest("regions need latents [samples, channels, h, w] or packed ones with img_ids")
        rows, columns = ids.reshape(-1, ids.shape[-1])[:, -2:].long().amax(0).add(1).tolist()
        return int(rows), int(columns)

    def repeated(self, times: int) -> "Call":
        """Every sample ``times`` in a row."""
        return self._mapped(lambda t: t.repeat_interleave(times, 0))

    def cropped(self, top: int, left: int, height: int, width: int) -> "Call":
        """The same call on a rectangle of the latents, in positions."""
        if self.sample.ndim == 4:
            return self._with_sample(self.sample[..., top : top + height, left : left + width])
        rows, columns = self.grid
        positions = torch.arange(rows * columns, device=self.sample.device).view(rows, columns)
        keep = positions[top : top + height, left : left + width].flatten()
        ids = self.kwargs["img_ids"]
        smaller = replace(self, kwargs={**self.kwargs, "img_ids": ids[..., keep, :]})
        return smaller._with_sample(self.sample[:, keep])

    def __call__(self) -> Tensor:
        """The prediction, shaped like ``sample``."""
        return _tensor(self.forward(*self.args, **self.kwargs))

    @property
    def _sample_name(self) -> str:
        return next(name for name in ("sample", "hidden_states") if name in self.kwargs)

    def _with_sample(self, sample: Tensor) -> "Call":
        if self.args:
            return replace(self, args=(sample, *self.args[1:]))
        return replace(self, kwargs={**self.kwargs, self._sample_name: sample})

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "Call":
        n = len(self.sample)

        def mapped(value: Any) -> Any:
            match value:
                case Tensor() if value.ndim and len(value) == n:
                    return function(value)
                case Mapping():
                    return {k: v if k in _NO_BATCH else mapped(v) for k, v in value.items()}
                case list() | tuple():
                    return type(value)(mapped(v) for v in value)
            return value

        return replace(self, args=mapped(tuple(self.args)), kwargs=mapped(dict(self.kwargs)))


@contextmanager
def caught(pipe: Any, handler: Callable[[Call], Tensor]) -> Iterator[None]:
    """While open, ``handler`` answers every call of the pipeline's denoiser. Contexts nest: the inner one's calls reach
    the outer one."""
    _, module = denoiser_of(pipe)
    own = module.__dict__.get("forward")
    forward = module.forward

    def answered(*args: Any, **kwargs: Any) -> Any:
        made = handler(Call(forward, args, {**kwargs, "return_dict": False}))
        if kwargs.get("return_dict", True):
            from diffusers.models.modeling_outputs import Transformer2DModelOutput
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

            kind = UNet2DConditionOutput if denoiser_of(pipe)[0] == "unet" else Transformer2DModelOutput
            return kind(sample=made)
        return (made,)

    module.forward = answered
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def predictions(call: Call, target: Mapping[str, nn.Module], loras: LoraWeights, chunk: int | None = None) -> Tensor:
    """What each of k LoRAs (the batch axis) predicts for the same call, [k, *sample], in one batched forward.

    ``chunk`` is the number of LoRAs in one forward; it is halved when the device has no memory for more.
    """
    k, samples = len(loras), len(call.sample)
    chunk = min(chunk or k, k)
    while True:
        try:
            parts = []
            for first in range(0, k, chunk):
                some = loras[first : first + chunk]
                with injected(target, some):
                    made = call.repeated(len(some))()
                parts.append(made.unflatten(0, (samples, len(some))).movedim(1, 0))
            return torch.cat(parts)
        except torch.OutOfMemoryError:
            if chunk == 1:
                raise
            chunk = (chunk + 1) // 2


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample
