"""Several LoRAs on an ordinary diffusers pipeline while it samples.

merge        W + Σ wᵢ ΔWᵢ
switch       one LoRA at a time, the next every few steps                            (2402.16843, LoRA switch)
composite    the mean of all LoRAs' predictions, conditional and unconditional       (2402.16843, LoRA composite)
spatial      each LoRA's prediction in its region; boxes may also be windows         (windows: 2302.08113)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from hyperlora.diffusion.denoiser_calls import (
    DenoiserCall,
    get_denoiser,
    intercept_denoiser,
    predict_per_lora,
)
from hyperlora.diffusion.lora_injection import (
    inject_lora,
    move_to_module,
    split_denoiser,
    split_text_encoders,
)
from hyperlora.diffusion.regions import Region, compute_region_masks, compute_region_windows
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.merge import pad_and_stack, validate_weights
from hyperlora.lora.weights import LoraWeights

Strategy = Literal["merge", "switch", "composite", "spatial"]
STRATEGIES: Final = ("merge", "switch", "composite", "spatial")
Schedule = Callable[[int, int], Sequence[float]]
"""(step from 0, number of steps) to one strength per LoRA."""


@contextmanager
def compose_loras(
    pipe: Any,
    loras: Sequence[LoraWeights],
    strategy: Strategy = "merge",
    weights: Sequence[float] | None = None,
    *,
    schedule: Schedule | None = None,
    switch_every: int = 5,
    switch_order: Sequence[int] | None = None,
    composite_weights: Sequence[float] | None = None,
    regions: Sequence[Region] | None = None,
    windowed: bool = False,
    chunk_size: int | None = None,
) -> Iterator[None]:
    """While open, every picture of ``pipe`` (UNet or DiT) is drawn with all ``measure_lora_throughput``.

    ``weights`` multiply each ΔW; ``schedule`` multiplies them once more, step by step. ``switch``: LoRA ``switch_order[0]`` is
    active for ``switch_every`` steps, then the next, round and round. ``composite``: ``compute_blend_matrix`` weigh the mean. ``spatial``:
    one of ``evaluate_regions`` per LoRA; where they overlap their mean is taken, where there is none the base draws alone; with
    ``windowed`` each box is denoised as a picture of its own, which bases that know one subject per picture need.
    ``composite`` and ``spatial`` predict with all LoRAs in one forward, ``chunk_size`` at a time if memory asks for it.

    A pipeline encodes its prompt once: LoRAs of text encoders are added up, by their weights, in every strategy.

    Example: ``with compose_loras(pipe, [me, you], "composite"): pipe("two friends").images[0]``

    Raises ``InvalidArgumentError`` for arguments that make no sense together, ``LayoutMismatchError`` for a LoRA of another base.
    """
    if strategy not in STRATEGIES:
        raise InvalidArgumentError(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
    scales = validate_weights(weights, len(loras))
    name, denoiser = get_denoiser(pipe)
    with ExitStack() as stack:
        for lora, scale in zip(loras, scales, strict=True):
            for module, text_lora in split_text_encoders(pipe, lora, name):
                stack.enter_context(inject_lora(module, text_lora * scale))
        denoiser_loras = [
            move_to_module(split_denoiser(lora, name), denoiser) * f
            for lora, f in zip(loras, scales, strict=True)
        ]
        modules = {name: denoiser}
        if strategy == "merge" and schedule is None:
            for lora in denoiser_loras:
                stack.enter_context(inject_lora(modules, lora))
        elif strategy in ("merge", "switch"):
            if strategy == "switch":
                schedule = _make_switch_schedule(
                    len(denoiser_loras), switch_every, switch_order, schedule
                )
            assert schedule is not None
            stack.enter_context(
                intercept_denoiser(
                    pipe, _make_merge_handler(pipe, modules, denoiser_loras, schedule)
                )
            )
        else:
            if strategy == "composite":
                scheduled_loras = _ScheduledLoras(
                    pipe, pad_and_stack(denoiser_loras), schedule, len(denoiser_loras)
                )
                handler = _make_composite_handler(
                    modules,
                    scheduled_loras,
                    _normalize_weights(composite_weights, len(denoiser_loras)),
                    chunk_size,
                )
            else:  # the base draws what no region covers: a last LoRA of zeros
                scheduled_loras = _ScheduledLoras(
                    pipe,
                    pad_and_stack([*denoiser_loras, denoiser_loras[0] * 0.0]),
                    schedule,
                    len(denoiser_loras),
                )
                handler = _make_spatial_handler(
                    modules,
                    scheduled_loras,
                    _validate_regions(regions, len(denoiser_loras)),
                    windowed,
                    chunk_size,
                )
            stack.enter_context(intercept_denoiser(pipe, handler))
        yield


class StepCounter:
    """Which step of a run a call belongs to: a new step at every lower timestep, step 0 again at a higher one."""

    def __init__(self, pipe: Any) -> None:
        self._pipe, self._last_timestep, self._step = pipe, float("inf"), -1

    def step_for(self, timestep: float) -> int:
        if timestep > self._last_timestep:
            self._step = -1
        if timestep != self._last_timestep:
            self._last_timestep, self._step = timestep, self._step + 1
        return self._step

    @property
    def num_steps(self) -> int:
        return int(
            getattr(self._pipe, "num_timesteps", None) or len(self._pipe.scheduler.timesteps)
        )


class _ScheduledLoras:
    """A batch of LoRAs, the first k as strong as the schedule says at each call."""

    def __init__(
        self, pipe: Any, loras: LoraWeights, schedule: Schedule | None, num_loras: int
    ) -> None:
        self.step_counter, self.loras, self.schedule, self.num_loras = (
            StepCounter(pipe),
            loras,
            schedule,
            num_loras,
        )

    def scale_loras(self, call: DenoiserCall) -> LoraWeights:
        if self.schedule is None:
            return self.loras
        scales = _evaluate_schedule(self.schedule, self.step_counter, call, self.num_loras) + [
            1.0
        ] * (len(self.loras) - self.num_loras)
        return self.loras * torch.tensor(scales).to(self.loras.up[0])


def _make_merge_handler(
    pipe: Any, modules: Mapping[str, nn.Module], loras: Sequence[LoraWeights], schedule: Schedule
) -> Callable[[DenoiserCall], Tensor]:
    step_counter = StepCounter(pipe)

    def predict_merge(call: DenoiserCall) -> Tensor:
        with ExitStack() as stack:
            for lora, scale in zip(
                loras, _evaluate_schedule(schedule, step_counter, call, len(loras)), strict=True
            ):
                if scale:
                    stack.enter_context(inject_lora(modules, lora * scale))
            return call()

    return predict_merge


def _make_switch_schedule(
    num_loras: int, switch_every: int, switch_order: Sequence[int] | None, schedule: Schedule | None
) -> Schedule:
    cycle = list(switch_order) if switch_order is not None else list(range(num_loras))
    if switch_every < 1:
        raise InvalidArgumentError(f"a LoRA must stay for at least 1 step, got {switch_every}")
    if not cycle or any(not 0 <= i < num_loras for i in cycle):
        raise InvalidArgumentError(f"order must name LoRAs 0 to {num_loras - 1}, got {cycle}")

    def compute_scales(step: int, num_steps: int) -> list[float]:
        active_index = cycle[step // switch_every % len(cycle)]
        scales = schedule(step, num_steps) if schedule is not None else [1.0] * num_loras
        return [float(s) if i == active_index else 0.0 for i, s in enumerate(scales)]

    return compute_scales


def _make_composite_handler(
    modules: Mapping[str, nn.Module],
    scheduled_loras: _ScheduledLoras,
    composite_weights: Tensor,
    chunk_size: int | None,
) -> Callable[[DenoiserCall], Tensor]:
    def predict_composite(call: DenoiserCall) -> Tensor:
        model_outputs = predict_per_lora(
            call, modules, scheduled_loras.scale_loras(call), chunk_size
        )
        return torch.einsum("k,k...->...", composite_weights.to(model_outputs), model_outputs)

    return predict_composite


def _make_spatial_handler(
    modules: Mapping[str, nn.Module],
    scheduled_loras: _ScheduledLoras,
    regions: Sequence[Region],
    windowed: bool,
    chunk_size: int | None,
) -> Callable[[DenoiserCall], Tensor]:
    num_regions = len(regions)

    @cache  # the same for every step of a picture
    def compute_region_weights(latent_size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Each region's share of every position (overlaps are averaged), and the base's, if any."""
        region_masks = compute_region_masks(regions, latent_size)
        coverage = region_masks.sum(0)
        return region_masks / coverage.clamp_min(1), 1 - coverage.clamp(max=1) if bool(
            (coverage < 1).any()
        ) else None

    def predict_spatial(call: DenoiserCall) -> Tensor:
        region_weights, base_weight = compute_region_weights(call.latent_size)
        loras = scheduled_loras.scale_loras(call)
        if windowed:
            model_outputs = _predict_windows(
                call, modules, loras, compute_region_windows(regions, call.latent_size)
            )
            model_outputs += [call()] if base_weight is not None else []
        else:
            model_outputs = list(
                predict_per_lora(
                    call,
                    modules,
                    loras if base_weight is not None else loras[:num_regions],
                    chunk_size,
                )
            )
        weights = [*region_weights, *([base_weight] if base_weight is not None else [])]
        weighted_outputs = [
            _reshape_mask(w.to(m), call) * m for w, m in zip(weights, model_outputs, strict=True)
        ]
        return torch.stack(weighted_outputs).sum(0)

    return predict_spatial


def _predict_windows(
    call: DenoiserCall,
    modules: Mapping[str, nn.Module],
    loras: LoraWeights,
    boxes: Sequence[tuple[int, int, int, int]],
) -> list[Tensor]:
    """Each LoRA's prediction on its own window, in place in a picture of zeros."""
    outputs = []
    for i, (top, left, height, width) in enumerate(boxes):
        with inject_lora(modules, loras[i]):
            model_output = call.crop_latents(top, left, height, width)()
        rows, columns = call.latent_size
        if model_output.ndim == 4:
            full_output = model_output.new_zeros(*model_output.shape[:2], rows, columns)
            full_output[..., top : top + height, left : left + width] = model_output
        else:
            canvas = model_output.new_zeros(
                len(model_output), rows, columns, model_output.shape[-1]
            )
            canvas[:, top : top + height, left : left + width] = model_output.unflatten(
                1, (height, width)
            )
            full_output = canvas.flatten(1, 2)
        outputs.append(full_output)
    return outputs


def _reshape_mask(mask: Tensor, call: DenoiserCall) -> Tensor:
    """[height, width] so that it multiplies a prediction."""
    return mask if call.sample.ndim == 4 else mask.flatten()[:, None]


def _normalize_weights(weights: Sequence[float] | None, num_loras: int) -> Tensor:
    values = torch.tensor(validate_weights(weights, num_loras))
    if not values.sum() > 0:
        raise InvalidArgumentError(
            f"shares of a mean must have a positive sum, got {list(weights or [])}"
        )
    return values / values.sum()


def _validate_regions(regions: Sequence[Region] | None, num_loras: int) -> Sequence[Region]:
    if regions is None or len(regions) != num_loras:
        raise InvalidArgumentError(
            f"spatial needs one region per LoRA: {num_loras} LoRAs, {len(regions or [])} regions given"
        )
    return regions


def _evaluate_schedule(
    schedule: Schedule, step_counter: StepCounter, call: DenoiserCall, num_loras: int
) -> list[float]:
    return validate_weights(
        schedule(step_counter.step_for(call.timestep), step_counter.num_steps), num_loras
    )
