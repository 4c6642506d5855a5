"""Intercept the denoiser calls of a running pipeline, as composition and guidance do."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from hyperlora.diffusion.families.base import PipelineFamily, Window
from hyperlora.diffusion.families.registry import get_pipeline_family
from hyperlora.diffusion.lora_injection import inject_lora, pause_compilation
from hyperlora.lora.layout import unwrap_module
from hyperlora.lora.weights import LoraWeights

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    _DenoiserReturn: TypeAlias = tuple[Tensor] | UNet2DConditionOutput | Transformer2DModelOutput


@dataclass(frozen=True)
class DenoiserCall:
    """One call of a denoiser by a pipeline.

    Attributes:
        family: Adapter of the pipeline.
        forward: The denoiser's own forward.
        inputs: Arguments of the pipeline, by their names.
    """

    family: PipelineFamily
    forward: Callable[..., Any]
    inputs: Mapping[str, Any]

    @property
    def num_samples(self) -> int:
        """Batch size, of all guidance branches together."""
        return len(self.inputs[self.family.latents_input])

    @property
    def timestep(self) -> float:
        """Time of the first sample, which falls from step to step; its unit is the family's."""
        value = self.inputs[self.family.timestep_input]
        time = float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)
        return -time if self.family.time_runs_upward else time

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the noisy latents, in positions or tokens.

        Raises:
            InvalidArgumentError: The family does not tell them.
        """
        return self.family.get_grid(dict(self.inputs))

    def repeat_samples(self, repeats: int) -> "DenoiserCall":
        """Return the call with each sample ``repeats`` times in a row."""
        batch_size = self.num_samples

        def repeat_value(name: str, value: Any) -> Any:  # noqa: ANN401 - any argument of a denoiser
            """Repeat the samples of an argument, also inside containers."""
            if name in self.family.unbatched_inputs:
                return value
            if name in self.family.listed_inputs:
                return [item for item in value for _ in range(repeats)]
            if name in self.family.batch_axis_1_inputs:
                return value.repeat_interleave(repeats, 1)
            match value:
                case Tensor() if value.ndim and len(value) == batch_size:
                    return value.repeat_interleave(repeats, 0)
                case Mapping():
                    return {key: repeat_value(key, item) for key, item in value.items()}
                case list() | tuple():
                    return type(value)(repeat_value("", item) for item in value)
            return value

        inputs = {name: repeat_value(name, value) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs)

    def crop_latents(self, window: Window) -> "DenoiserCall":
        """Return the call on a rectangle of the latents, in units of ``grid``."""
        return replace(self, inputs=self.family.crop_inputs(dict(self.inputs), window))

    def __call__(self) -> Tensor:
        """Run the denoiser.

        Returns:
            Predictions [n, c, h, w], or [n, tokens, c]; a list of them is stacked.
        """
        output = self.forward(**self.inputs, return_dict=False)[0]
        return output if isinstance(output, Tensor) else torch.stack(list(output))


@contextmanager
def intercept_denoiser(
    pipe: "DiffusionPipeline", handler: Callable[[DenoiserCall], Tensor]
) -> Iterator[None]:
    """Answer each call of a pipeline's denoiser by ``handler``, within a ``with`` block.

    Blocks nest: a call that the inner handler makes reaches the outer handler.

    Args:
        pipe: The pipeline.
        handler: Returns the prediction, as ``DenoiserCall.__call__`` does.

    Yields:
        Nothing.

    Raises:
        InvalidArgumentError: The pipeline has no family.
    """
    family = get_pipeline_family(pipe)
    module = unwrap_module(family.denoiser)
    instance_forward = module.__dict__.get("forward")
    forward = module.forward
    signature = inspect.signature(type(module).forward)

    def call_handler(*args: Any, **kwargs: Any) -> "_DenoiserReturn":
        """Return the handler's prediction in the form that the pipeline expects."""
        inputs = dict(signature.bind(module, *args, **kwargs).arguments)
        del inputs["self"]
        return_dict = inputs.pop("return_dict", True)
        output = handler(DenoiserCall(family, forward, inputs))
        # where a denoiser takes lists it also returns one
        returned: Any = list(output) if family.latents_input in family.listed_inputs else output
        if not return_dict:
            return (returned,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        output_class = (
            UNet2DConditionOutput if family.denoiser_name == "unet" else Transformer2DModelOutput
        )
        return output_class(sample=returned)

    # first, as a compiled forward that is replaced cannot be seen any more
    with pause_compilation(family.denoiser):
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
        Predictions, k times what ``call()`` returns.
    """
    num_loras, batch_size = len(loras), call.num_samples
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
