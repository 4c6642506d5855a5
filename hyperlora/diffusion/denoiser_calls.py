"""Calls of a pipeline's denoiser, caught while an ordinary pipeline runs: what composition and guidance stand on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.weights import LoraWeights

_UNBATCHED_ARGS = frozenset(
    {"img_ids", "txt_ids", "image_rotary_emb", "img_shapes", "txt_seq_lens"}
)
"""Arguments of DiTs that describe positions, not samples."""


def get_denoiser(pipe: Any) -> tuple[str, nn.Module]:
    """The component of a diffusers pipeline that denoises, by name. Raises ``InvalidArgumentError`` if it has none."""
    for name in ("unet", "transformer"):
        if isinstance(module := getattr(pipe, name, None), nn.Module):
            return name, module
    raise InvalidArgumentError(
        f"{type(pipe).__name__} has neither unet nor transformer: no LoRA can be composed on it"
    )


@dataclass(frozen=True)
class DenoiserCall:
    """One call of a denoiser. ``args`` and ``kwargs`` are what the pipeline gave; ``export_sample`` is the noisy latents,
    [samples, channels, h, w] or packed [samples, tokens, channels] (FLUX)."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def sample(self) -> Tensor:
        return self.args[0] if self.args else self.kwargs[self._sample_name]

    @property
    def timestep(self) -> float:
        value = self.args[1] if len(self.args) > 1 else self.kwargs["timestep"]
        return float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents in positions (of packed ones, by their ids)."""
        if self.sample.ndim == 4:
            return self.sample.shape[-2], self.sample.shape[-1]
        ids = self.kwargs.get("img_ids")
        if not isinstance(ids, Tensor):
            raise InvalidArgumentError(
                "regions need latents [samples, channels, h, w] or packed ones with img_ids"
            )
        rows, columns = ids.reshape(-1, ids.shape[-1])[:, -2:].long().amax(0).add(1).tolist()
        return int(rows), int(columns)

    def repeat_samples(self, repeats: int) -> "DenoiserCall":
        """Every sample ``repeats`` in a row."""
        return self._apply_to_batch(lambda t: t.repeat_interleave(repeats, 0))

    def crop_latents(self, top: int, left: int, height: int, width: int) -> "DenoiserCall":
        """The same call on a rectangle of the latents, in positions."""
        if self.sample.ndim == 4:
            return self._set_sample(self.sample[..., top : top + height, left : left + width])
        rows, columns = self.latent_size
        positions = torch.arange(rows * columns, device=self.sample.device).view(rows, columns)
        indices = positions[top : top + height, left : left + width].flatten()
        ids = self.kwargs["img_ids"]
        cropped_call = replace(self, kwargs={**self.kwargs, "img_ids": ids[..., indices, :]})
        return cropped_call._set_sample(self.sample[:, indices])

    def __call__(self) -> Tensor:
        """The prediction, shaped like ``export_sample``."""
        return _get_sample(self.forward(*self.args, **self.kwargs))

    @property
    def _sample_name(self) -> str:
        return next(name for name in ("sample", "hidden_states") if name in self.kwargs)

    def _set_sample(self, sample: Tensor) -> "DenoiserCall":
        if self.args:
            return replace(self, args=(sample, *self.args[1:]))
        return replace(self, kwargs={**self.kwargs, self._sample_name: sample})

    def _apply_to_batch(self, fn: Callable[[Tensor], Tensor]) -> "DenoiserCall":
        batch_size = len(self.sample)

        def apply_to_value(value: Any) -> Any:
            match value:
                case Tensor() if value.ndim and len(value) == batch_size:
                    return fn(value)
                case Mapping():
                    return {
                        k: v if k in _UNBATCHED_ARGS else apply_to_value(v)
                        for k, v in value.items()
                    }
                case list() | tuple():
                    return type(value)(apply_to_value(v) for v in value)
            return value

        return replace(
            self, args=apply_to_value(tuple(self.args)), kwargs=apply_to_value(dict(self.kwargs))
        )


@contextmanager
def intercept_denoiser(pipe: Any, handler: Callable[[DenoiserCall], Tensor]) -> Iterator[None]:
    """While open, ``handler`` answers every call of the pipeline's denoiser. Contexts nest: the inner one's calls reach
    the outer one."""
    _, module = get_denoiser(pipe)
    instance_forward = module.__dict__.get("forward")
    forward = module.forward

    def call_handler(*args: Any, **kwargs: Any) -> Any:
        model_output = handler(DenoiserCall(forward, args, {**kwargs, "return_dict": False}))
        if kwargs.get("return_dict", True):
            from diffusers.models.modeling_outputs import Transformer2DModelOutput
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

            output_class = (
                UNet2DConditionOutput
                if get_denoiser(pipe)[0] == "unet"
                else Transformer2DModelOutput
            )
            return output_class(sample=model_output)
        return (model_output,)

    module.forward = call_handler
    try:
        yield
    finally:
        if instance_forward is None:
            del module.forward
        else:
            module.forward = instance_forward


def predict_per_lora(
    call: DenoiserCall,
    modules: Mapping[str, nn.Module],
    loras: LoraWeights,
    chunk_size: int | None = None,
) -> Tensor:
    """What each of k LoRAs (the batch axis) predicts for the same call, [k, *sample], in one batched forward.

    ``chunk_size`` is the number of LoRAs in one forward; it is halved when the device has no memory for more.
    """
    num_loras, batch_size = len(loras), len(call.sample)
    chunk_size = min(chunk_size or num_loras, num_loras)
    while True:
        try:
            outputs = []
            for start in range(0, num_loras, chunk_size):
                lora_chunk = loras[start : start + chunk_size]
                with inject_lora(modules, lora_chunk):
                    model_output = call.repeat_samples(len(lora_chunk))()
                outputs.append(
                    model_output.unflatten(0, (batch_size, len(lora_chunk))).movedim(1, 0)
                )
            return torch.cat(outputs)
        except torch.OutOfMemoryError:
            if chunk_size == 1:
                raise
            chunk_size = (chunk_size + 1) // 2


def _get_sample(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample
