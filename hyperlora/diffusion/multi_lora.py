"""Several LoRAs on an ordinary diffusers pipeline while it samples.

merge        W + Σ wᵢ ΔWᵢ
switch       one LoRA at a time, the next every few steps    (LoRA switch, 2402.16843)
composite    mean of all predictions, on each branch         (LoRA composite, 2402.16843)
spatial      each prediction in its region or window         (windows: 2302.08113)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final, Literal

import torch
from torch import Tensor, nn

from hyperlora.diffusion.denoiser_calls import (
    DenoiserCall,
    intercept_denoiser,
    predict_per_lora,
)
from hyperlora.diffusion.families.base import Window
from hyperlora.diffusion.families.registry import get_pipeline_family
from hyperlora.diffusion.lora_injection import (
    inject_lora,
    split_denoiser,
    split_text_encoders,
)
from hyperlora.diffusion.regions import Region, compute_region_masks, compute_region_windows
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.merge import pad_and_stack, validate_weights
from hyperlora.lora.weights import LoraWeights

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Strategy = Literal["merge", "switch", "composite", "spatial"]
STRATEGIES: Final = ("merge", "switch", "composite", "spatial")
Schedule = Callable[[int, int], Sequence[float]]
"""(step from 0, number of steps) to one scale per LoRA."""
Handler = Callable[[DenoiserCall], Tensor]
"""Answers a denoiser call with a prediction [n, c, h, w], or packed [n, tokens, c]."""


@dataclass(frozen=True, kw_only=True)
class CompositionConfig:
    """Settings of single strategies of ``compose_loras``.

    Attributes:
        switch_every: ``switch``: steps for which each LoRA is active.
        switch_order: ``switch``: LoRA numbers in the order of their turns, repeated cyclically; by
            default 0, 1, ...
        composite_weights: ``composite``: weights of the mean of the predictions; by default equal.
        regions: ``spatial``: one box or mask for each LoRA.
        windowed: ``spatial``: denoise each box as an image of its own, for bases that know one
            subject per image.
        chunk_size: ``composite`` and ``spatial``: LoRAs per forward pass; by default all, and
            fewer when memory runs out.
    """

    switch_every: int = 5
    switch_order: Sequence[int] | None = None
    composite_weights: Sequence[float] | None = None
    regions: Sequence[Region] | None = None
    windowed: bool = False
    chunk_size: int | None = None


@contextmanager
def compose_loras(
    pipe: "DiffusionPipeline",
    loras: Sequence[LoraWeights],
    strategy: Strategy = "merge",
    weights: Sequence[float] | None = None,
    *,
    schedule: Schedule | None = None,
    config: CompositionConfig | None = None,
) -> Iterator[None]:
    """Sample with several LoRAs within a ``with`` block, on a UNet or a transformer.

    A pipeline encodes its prompt once. LoRAs of text encoders are therefore summed by their
    weights in every strategy, also a LoRA that adapts nothing else. With ``spatial``, the mean is
    taken where regions overlap, and the base alone predicts where there is none.

    Example: ``with compose_loras(pipe, [me, you], "composite"): pipe("two friends").images[0]``

    Args:
        pipe: The pipeline.
        loras: k LoRAs of the pipeline's base, of any ranks and targets; no batch axes.
        strategy: How the LoRAs are composed, see the table above.
        weights: One factor for each ΔW; by default 1.
        schedule: Further factors for each ΔW, by the step.
        config: Settings of the strategy; by default ``CompositionConfig()``.

    Yields:
        Nothing.

    Raises:
        InvalidArgumentError: Arguments do not fit together.
        LayoutMismatchError: A LoRA is for another base.
    """
    if strategy not in STRATEGIES:
        raise InvalidArgumentError(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
    config = config or CompositionConfig()
    scales = validate_weights(weights, len(loras))
    if strategy == "spatial":
        _validate_regions(config.regions, len(loras))
    family = get_pipeline_family(pipe)
    name = family.denoiser_name
    with ExitStack() as stack:
        for lora, scale in zip(loras, scales, strict=True):
            # contexts nest and their LoRAs add up: Σ wᵢ ΔWᵢ on the text encoders
            for module, text_lora in split_text_encoders(pipe, lora, name):
                stack.enter_context(inject_lora(module, text_lora * scale))
        denoiser_loras = split_denoiser(
            family, [lora * scale for lora, scale in zip(loras, scales, strict=True)]
        )
        modules: Mapping[str, nn.Module] = {name: family.denoiser}
        if strategy == "merge" and schedule is None:  # Σ wᵢ ΔWᵢ is the same at every step
            for lora in denoiser_loras:
                stack.enter_context(inject_lora(modules, lora))
        elif denoiser_loras:  # else they adapt text encoders alone
            handler = _make_handler(pipe, modules, denoiser_loras, strategy, schedule, config)
            stack.enter_context(intercept_denoiser(pipe, handler))
        yield


class StepCounter:
    """Number of the sampling step that a denoiser call belongs to.

    Each lower timestep is a new step. A higher timestep starts a new run at step 0.

    Args:
        pipe: The pipeline that samples.
    """

    def __init__(self, pipe: "DiffusionPipeline") -> None:
        self._pipe = pipe
        self._last_timestep, self._step = float("inf"), -1  # so the first call is step 0

    def count_step(self, timestep: float) -> int:
        """Return the step number, from 0, of a call at this timestep."""
        if timestep > self._last_timestep:
            self._step = -1
        # equal timesteps are one step: pipelines without batched guidance call once per branch
        if timestep != self._last_timestep:
            self._last_timestep, self._step = timestep, self._step + 1
        return self._step

    @property
    def num_steps(self) -> int:
        """Number of steps of the current run."""
        return int(
            getattr(self._pipe, "num_timesteps", None) or len(self._pipe.scheduler.timesteps)
        )


class _ScheduledLoras:
    """A batch of LoRAs; a schedule, if there is one, scales the first ``num_loras``."""

    def __init__(
        self,
        pipe: "DiffusionPipeline",
        loras: LoraWeights,
        schedule: Schedule | None,
        num_loras: int,
    ) -> None:
        self.step_counter = StepCounter(pipe)
        self.loras, self.schedule, self.num_loras = loras, schedule, num_loras

    def scale_loras(self, call: DenoiserCall) -> LoraWeights:
        """Return the LoRAs as the schedule scales them at the step of this call."""
        if self.schedule is None:
            return self.loras
        scales = _evaluate_schedule(self.schedule, self.step_counter, call, self.num_loras)
        scales += [1.0] * (len(self.loras) - self.num_loras)  # the LoRA of zeros of ``spatial``
        return self.loras * torch.tensor(scales).to(self.loras.up[0])  # one scale per LoRA


def _make_handler(
    pipe: "DiffusionPipeline",
    modules: Mapping[str, nn.Module],
    loras: Sequence[LoraWeights],
    strategy: Strategy,
    schedule: Schedule | None,
    config: CompositionConfig,
) -> Handler:
    """Make the handler of a strategy other than a merge with constant weights."""
    num_loras = len(loras)
    if strategy == "switch":
        schedule = _make_switch_schedule(num_loras, schedule, config)
    if strategy in ("merge", "switch"):
        assert schedule is not None
        return _make_merge_handler(pipe, modules, loras, schedule)
    if strategy == "composite":
        composite_weights = _normalize_weights(config.composite_weights, num_loras)  # [k]
        scheduled_loras = _ScheduledLoras(pipe, pad_and_stack(loras), schedule, num_loras)
        return _make_composite_handler(
            modules, scheduled_loras, composite_weights, config.chunk_size
        )
    # a last LoRA of zeros gives the base's prediction for positions outside all regions
    stacked_loras = pad_and_stack([*loras, loras[0] * 0.0])  # [k + 1]
    scheduled_loras = _ScheduledLoras(pipe, stacked_loras, schedule, num_loras)
    return _make_spatial_handler(modules, scheduled_loras, config)


def _make_merge_handler(
    pipe: "DiffusionPipeline",
    modules: Mapping[str, nn.Module],
    loras: Sequence[LoraWeights],
    schedule: Schedule,
) -> Handler:
    """Make a handler of W + Σ sᵢ(step) ΔWᵢ."""
    step_counter = StepCounter(pipe)

    def predict_merge(call: DenoiserCall) -> Tensor:
        """Predict with all LoRAs whose scale at this step is not 0."""
        scales = _evaluate_schedule(schedule, step_counter, call, len(loras))
        with ExitStack() as stack:
            for lora, scale in zip(loras, scales, strict=True):
                if scale:  # hooks of ΔW = 0 would cost time and add nothing
                    stack.enter_context(inject_lora(modules, lora * scale))
            return call()

    return predict_merge


def _make_switch_schedule(
    num_loras: int, schedule: Schedule | None, config: CompositionConfig
) -> Schedule:
    """Make the schedule of LoRA switch: one LoRA at its own scale, the others at 0."""
    order = config.switch_order
    cycle = list(order) if order is not None else list(range(num_loras))
    if config.switch_every < 1:
        raise InvalidArgumentError(
            f"switch_every must be at least 1 step, got {config.switch_every}"
        )
    if not cycle or any(not 0 <= i < num_loras for i in cycle):
        raise InvalidArgumentError(
            f"switch_order must name LoRAs 0 to {num_loras - 1}, got {cycle}"
        )

    def compute_scales(step: int, num_steps: int) -> list[float]:
        """Compute the scales [k] of one step, all but one of them 0."""
        # turn = ⌊step / switch_every⌋, cyclic
        active_index = cycle[step // config.switch_every % len(cycle)]
        scales = schedule(step, num_steps) if schedule is not None else [1.0] * num_loras
        return [float(s) if i == active_index else 0.0 for i, s in enumerate(scales)]

    return compute_scales


def _make_composite_handler(
    modules: Mapping[str, nn.Module],
    scheduled_loras: _ScheduledLoras,
    composite_weights: Tensor,
    chunk_size: int | None,
) -> Handler:
    """Make a handler of Σ cᵢ εᵢ with weights c [k] of sum 1 (2402.16843)."""

    def predict_composite(call: DenoiserCall) -> Tensor:
        """Predict the weighted mean [n, c, h, w] of the LoRAs' predictions."""
        loras = scheduled_loras.scale_loras(call)  # [k]
        model_outputs = predict_per_lora(call, modules, loras, chunk_size)  # [k, n, c, h, w]
        # [n, c, h, w]; predictions are averaged, not ΔW: each LoRA acts on its own forward pass
        return torch.einsum("k,k...->...", composite_weights.to(model_outputs), model_outputs)

    return predict_composite


def _make_spatial_handler(
    modules: Mapping[str, nn.Module],
    scheduled_loras: _ScheduledLoras,
    config: CompositionConfig,
) -> Handler:
    """Make a handler of Σ mᵢ εᵢ + m₀ ε, with masks of sum 1 at each position.

    The last of the scheduled LoRAs is one of zeros, for the base's prediction ε.
    """
    regions = config.regions or ()

    @cache  # the same for every step of an image
    def compute_windows(grid: tuple[int, int], multiple: int) -> Sequence[Window]:
        """Round the boxes to windows whose edges are multiples of a denoiser's patch."""
        rows, columns = grid
        windows = compute_region_windows(regions, (rows // multiple, columns // multiple))
        return [
            (top * multiple, left * multiple, height * multiple, width * multiple)
            for top, left, height, width in windows
        ]

    @cache
    def compute_region_weights(
        grid: tuple[int, int], multiple: int
    ) -> tuple[Tensor, Tensor | None]:
        """Compute mᵢ [regions, h, w] and m₀ [h, w], None if the regions cover the image."""
        if config.windowed:  # a window predicts all of its positions, and no other
            region_masks = torch.zeros(len(regions), *grid)
            for mask, (top, left, height, width) in zip(
                region_masks, compute_windows(grid, multiple), strict=True
            ):
                mask[top : top + height, left : left + width] = 1
        else:
            region_masks = compute_region_masks(regions, grid)  # [regions, h, w]
        coverage = region_masks.sum(0)  # [h, w]
        region_weights = region_masks / coverage.clamp_min(1)  # overlaps are averaged
        is_covered = not bool((coverage < 1).any())
        return region_weights, None if is_covered else 1 - coverage.clamp(max=1)

    def predict_spatial(call: DenoiserCall) -> Tensor:
        """Predict each position [n, c, h, w] with the LoRAs of its regions."""
        grid, multiple = call.grid, call.family.grid_multiple
        region_weights, base_weight = compute_region_weights(grid, multiple)
        loras = scheduled_loras.scale_loras(call)  # [regions + 1]
        # one prediction [n, c, h, w] per region, and the base's if it is needed
        if config.windowed:
            model_outputs = _predict_windows(call, modules, loras, compute_windows(grid, multiple))
            # call() itself is the base: no hooks are registered here
            model_outputs += [call()] if base_weight is not None else []
        else:
            # without m₀, the last LoRA (of zeros) is left out
            loras = loras if base_weight is not None else loras[: len(regions)]
            model_outputs = list(predict_per_lora(call, modules, loras, config.chunk_size))
        # mᵢ and m₀, in the order of the predictions; [h, w] each
        masks = [*region_weights, *([base_weight] if base_weight is not None else [])]
        weighted_outputs = [
            _multiply_mask(mask.to(model_output), model_output)
            for mask, model_output in zip(masks, model_outputs, strict=True)
        ]
        return torch.stack(weighted_outputs).sum(0)  # [n, c, h, w]

    return predict_spatial


def _predict_windows(
    call: DenoiserCall,
    modules: Mapping[str, nn.Module],
    loras: LoraWeights,
    windows: Sequence[Window],
) -> list[Tensor]:
    """Predict with LoRA i in window i (top, left, height, width); zeros outside the window."""
    rows, columns = call.grid
    full_outputs = []
    for i, window in enumerate(windows):
        top, left, height, width = window
        with inject_lora(modules, loras[i]):
            # an image of its own: [n, c, height, width], or tokens [n, height * width, c]
            model_output = call.crop_latents(window)()
        window_rows, window_columns = slice(top, top + height), slice(left, left + width)
        if model_output.ndim > 3:  # [n, c, height, width], or with an axis of frames
            full_output = model_output.new_zeros(*model_output.shape[:-2], rows, columns)
            full_output[..., window_rows, window_columns] = model_output  # [n, c, rows, columns]
        else:  # the window's tokens come first, in row-major order
            tokens = model_output[:, : height * width]
            token_grid = tokens.new_zeros(len(tokens), rows, columns, tokens.shape[-1])
            token_grid[:, window_rows, window_columns] = tokens.unflatten(1, (height, width))
            full_output = token_grid.flatten(1, 2)  # [n, rows * columns, c]
        full_outputs.append(full_output)
    return full_outputs


def _multiply_mask(mask: Tensor, model_output: Tensor) -> Tensor:
    """Multiply a prediction by a mask [h, w].

    Of tokens [n, tokens, c] the first h * w are the latents'; those of an input image are dropped,
    as the pipeline does.
    """
    if model_output.ndim > 3:
        return mask * model_output  # [n, c, h, w]
    return mask.flatten()[:, None] * model_output[:, : mask.numel()]  # [n, h * w, c]


def _normalize_weights(weights: Sequence[float] | None, num_loras: int) -> Tensor:
    """Scale weights [k] to a sum of 1."""
    values = torch.tensor(validate_weights(weights, num_loras))
    if not values.sum() > 0:
        raise InvalidArgumentError(
            f"composite_weights must have a positive sum, got {list(weights or [])}"
        )
    return values / values.sum()


def _validate_regions(regions: Sequence[Region] | None, num_loras: int) -> None:
    """Raise ``InvalidArgumentError`` unless there is one region for each LoRA."""
    if regions is None or len(regions) != num_loras:
        raise InvalidArgumentError(
            f"spatial needs one region per LoRA: {num_loras} LoRAs, "
            f"{len(regions or [])} regions given"
        )


def _evaluate_schedule(
    schedule: Schedule, step_counter: StepCounter, call: DenoiserCall, num_loras: int
) -> list[float]:
    """Return the scales [k] of the schedule at the step of this call."""
    step = step_counter.count_step(call.timestep)
    return validate_weights(schedule(step, step_counter.num_steps), num_loras)
