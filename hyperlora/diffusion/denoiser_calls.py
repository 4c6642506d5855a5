"""Intercept the denoiser calls of a running pipeline, as composition and guidance do."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from hyperlora.diffusion.lora_injection import inject_lora
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.weights import LoraWeights

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    _DenoiserReturn: TypeAlias = tuple[Tensor] | UNet2DConditionOutput | Transformer2DModelOutput

_UNBATCHED_ARGS = frozenset(
    {"img_ids", "txt_ids", "image_rotary_emb", "img_shapes", "txt_seq_lens"}
)
"""Arguments of transformers that describe positions, not samples."""


def get_denoiser(pipe: "DiffusionPipeline") -> tuple[str, nn.Module]:
    """Return the denoiser of a pipeline with its component name.

    Raises:
        InvalidArgumentError: The pipeline has neither a UNet nor a transformer.
    """
    for name in ("unet", "transformer"):
        if isinstance(module := getattr(pipe, name, None), nn.Module):
            return name, module
    raise InvalidArgumentError(
        f"{type(pipe).__name__} has neither unet nor transformer: no LoRA can be composed on it"
    )


@dataclass(frozen=True)
class DenoiserCall:
    """One call of a denoiser by a pipeline.

    Attributes:
        forward: The denoiser's own forward.
        args: Positional arguments of the pipeline.
        kwargs: Keyword arguments of the pipeline.
    """

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def sample(self) -> Tensor:
        """Noisy latents [n, c, h, w], or packed ones [n, tokens, c] (FLUX)."""
        return self.args[0] if self.args else self.kwargs[self._sample_name]

    @property
    def timestep(self) -> float:
        """Timestep of the first sample."""
        value = self.args[1] if len(self.args) > 1 else self.kwargs["timestep"]
        return float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents in positions; for packed ones, by their position ids.

        Raises:
            InvalidArgumentError: Packed latents come without position ids.
        """
        if self.sample.ndim == 4:
            return self.sample.shape[-2], self.sample.shape[-1]
        ids = self.kwargs.get("img_ids")  # [tokens, (channel, row, column)]
        if not isinstance(ids, Tensor):
            raise InvalidArgumentError(
                "regions need latents [n, c, h, w], or packed ones with img_ids"
            )
        rows, columns = ids.reshape(-1, ids.shape[-1])[:, -2:].long().amax(0).add(1).tolist()
        return int(rows), int(columns)

    def repeat_samples(self, repeats: int) -> "DenoiserCall":
        """Return the call with each sample ``repeats`` times in a row."""
        return self._apply_to_batch(lambda t: t.repeat_interleave(repeats, 0))

    def crop_latents(self, top: int, left: int, height: int, width: int) -> "DenoiserCall":
        """Return the call on a rectangle of the latents.

        Args:
            top: First row, in positions.
            left: First column.
            height: Number of rows.
            width: Number of columns.

        Returns:
            The call with the latents (and position ids) of the rectangle.
        """
        if self.sample.ndim == 4:
            return self._set_sample(self.sample[..., top : top + height, left : left + width])
        rows, columns = self.latent_size
        positions = torch.arange(rows * columns, device=self.sample.device).view(rows, columns)
        indices = positions[top : top + height, left : left + width].flatten()  # [height * width]
        ids = self.kwargs["img_ids"]
        cropped_call = replace(self, kwargs={**self.kwargs, "img_ids": ids[..., indices, :]})
        return cropped_call._set_sample(self.sample[:, indices])

    def __call__(self) -> Tensor:
        """Run the denoiser; the result has the shape of ``sample``."""
        return _get_sample(self.forward(*self.args, **self.kwargs))

    @property
    def _sample_name(self) -> str:
        """Keyword of the latents: ``sample`` for UNets, ``hidden_states`` for transformers."""
        return next(name for name in ("sample", "hidden_states") if name in self.kwargs)

    def _set_sample(self, sample: Tensor) -> "DenoiserCall":
        if self.args:
            return replace(self, args=(sample, *self.args[1:]))
        return replace(self, kwargs={**self.kwargs, self._sample_name: sample})

    def _apply_to_batch(self, fn: Callable[[Tensor], Tensor]) -> "DenoiserCall":
        """Apply ``fn`` to each tensor argument that has the batch axis."""
        batch_size = len(self.sample)

        def apply_to_value(value: Any) -> Any:  # noqa: ANN401 - any argument of any denoiser
            """Apply ``fn`` to the tensors of an argument, also inside containers."""
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
def intercept_denoiser(
    pipe: "DiffusionPipeline", handler: Callable[[DenoiserCall], Tensor]
) -> Iterator[None]:
    """Answer each call of a pipeline's denoiser by ``handler``, within a ``with`` block.

    Blocks nest: a call that the inner handler makes reaches the outer handler.

    Args:
        pipe: The pipeline.
        handler: Returns a prediction of the shape of the call's ``sample``.

    Yields:
        Nothing.

    Raises:
        InvalidArgumentError: The pipeline has no denoiser.
    """
    component, module = get_denoiser(pipe)
    instance_forward = module.__dict__.get("forward")
    forward = module.forward

    def call_handler(*args: Any, **kwargs: Any) -> "_DenoiserReturn":
        """Return the handler's prediction in the form that the pipeline expects."""
        model_output = handler(DenoiserCall(forward, args, {**kwargs, "return_dict": False}))
        if kwargs.get("return_dict", True):
            from diffusers.models.modeling_outputs import Transformer2DModelOutput
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

            output_class = (
                UNet2DConditionOutput if component == "unet" else Transformer2DModelOutput
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
    """Predict with each of k LoRAs for the same call, in one batched forward pass.

    Args:
        call: The call.
        modules: The denoiser by its component name.
        loras: The LoRAs, a batch [k].
        chunk_size: LoRAs per forward pass, by default all; halved when memory runs out.

    Returns:
        Predictions [k, *sample].
    """
    num_loras, batch_size = len(loras), len(call.sample)
    chunk_size = min(chunk_size or num_loras, num_loras)
    while True:
        try:
            outputs = []
            for start in range(0, num_loras, chunk_size):
                lora_chunk = loras[start : start + chunk_size]
                with inject_lora(modules, lora_chunk):
                    model_output = call.repeat_samples(len(lora_chunk))()  # [n * chunk, ...]
                per_lora = model_output.unflatten(0, (batch_size, len(lora_chunk)))
                outputs.append(per_lora.movedim(1, 0))  # [chunk, n, ...]
            return torch.cat(outputs)  # [k, n, ...]
        except torch.OutOfMemoryError:
            if chunk_size == 1:
                raise
            chunk_size = (chunk_size + 1) // 2


def _get_sample(output: "_DenoiserReturn") -> Tensor:
    """Return the prediction of a denoiser called with or without ``return_dict``."""
    return output[0] if isinstance(output, tuple) else output.sample
