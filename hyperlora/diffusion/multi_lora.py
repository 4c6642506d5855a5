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

from hyperlora.diffusion.denoiser_calls import Call, caught, denoiser_of, predictions
from hyperlora.diffusion.lora_injection import denoiser_part, injected, on_device, text_parts
from hyperlora.diffusion.regions import Region, masks, windows
from hyperlora.errors import BadRequest
from hyperlora.lora.merge import align, checked_weights
from hyperlora.lora.weights import LoraWeights

Strategy = Literal["merge", "switch", "composite", "spatial"]
STRATEGIES: Final = ("merge", "switch", "composite", "spatial")
Schedule = Callable[[int, int], Sequence[float]]
"""(step from 0, number of steps) to one strength per LoRA."""


@contextmanager
def composed(
    pipe: Any,
    loras: Sequence[LoraWeights],
    strategy: Strategy = "merge",
    weights: Sequence[float] | None = None,
    *,
    schedule: Schedule | None = None,
    every: int = 5,
    order: Sequence[int] | None = None,
    shares: Sequence[float] | None = None,
    regions: Sequence[Region] | None = None,
    window: bool = False,
    chunk: int | None = None,
) -> Iterator[None]:
    """While open, every picture of ``pipe`` (UNet or DiT) is drawn with all ``loras``.

    ``weights`` multiply each ΔW; ``schedule`` multiplies them once more, step by step. ``switch``: LoRA ``order[0]`` is
    active for ``every`` steps, then the next, round and round. ``composite``: ``shares`` weigh the mean. ``spatial``:
    one of ``regions`` per LoRA; where they overlap their mean is taken, where there is none the base draws alone; with
    ``window`` each box is denoised as a picture of its own, which bases that know one subject per picture need.
    ``composite`` and ``spatial`` predict with all LoRAs in one forward, ``chunk`` at a time if memory asks for it.

    A pipeline encodes its prompt once: LoRAs of text encoders are added up, by their weights, in every strategy.

    Example: ``with composed(pipe, [me, you], "composite"): pipe("two friends").images[0]``

    Raises ``BadRequest`` for arguments that make no sense together, ``LayoutMismatch`` for a LoRA of another base.
    """
    if strategy not in STRATEGIES:
        raise BadRequest(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
    factors = checked_weights(weights, len(loras))
    name, denoiser = denoiser_of(pipe)
    with ExitStack() as stack:
        for lora, factor in zip(loras, factors, strict=True):
            for module, piece in text_parts(pipe, lora, name):
                stack.enter_context(injected(module, piece * factor))
        on = [on_device(denoiser_part(lora, name), denoiser) * f for lora, f in zip(loras, factors, strict=True)]
        target = {name: denoiser}
        if strategy == "merge" and schedule is None:
            for lora in on:
                stack.enter_context(injected(target, lora))
        elif strategy in ("merge", "switch"):
            if strategy == "switch":
                schedule = _switching(len(on), every, order, schedule)
            assert schedule is not None
            stack.enter_context(caught(pipe, _merged_by_step(pipe, target, on, schedule)))
        else:
            if strategy == "composite":
                strengths = _Strengths(pipe, align(on), schedule, len(on))
                combine = _composite(target, strengths, _shares(shares, len(on)), chunk)
            else:  # the base draws what no region covers: a last LoRA of zeros
                strengths = _Strengths(pipe, align([*on, on[0] * 0.0]), schedule, len(on))
                combine = _spatial(target, strengths, _regions(regions, len(on)), window, chunk)
            stack.enter_context(caught(pipe, combine))
        yield


class Steps:
    """Which step of a run a call belongs to: a new step at every lower timestep, step 0 again at a higher one."""

    def __init__(self, pipe: Any) -> None:
        self._pipe, self._last, self._step = pipe, float("inf"), -1

    def at(self, timestep: float) -> int:
        if timestep > self._last:
            self._step = -1
        if timestep != self._last:
            self._last, self._step = timestep, self._step + 1
        return self._step

    @property
    def total(self) -> int:
        return int(getattr(self._pipe, "num_timesteps", None) or len(self._pipe.scheduler.timesteps))


class _Strengths:
    """A batch of LoRAs, the first k as strong as the schedule says at each call."""

    def __init__(self, pipe: Any, batch: LoraWeights, schedule: Schedule | None, k: int) -> None:
        self.steps, self.batch, self.schedule, self.k = Steps(pipe), batch, schedule, k

    def at(self, call: Call) -> LoraWeights:
        if self.schedule is None:
            return self.batch
        found = _scheduled(self.schedule, self.steps, call, self.k) + [1.0] * (len(self.batch) - self.k)
        return self.batch * torch.tensor(found).to(self.batch.up[0])


def _merged_by_step(
    pipe: Any, target: Mapping[str, nn.Module], loras: Sequence[LoraWeights], schedule: Schedule
) -> Callable[[Call], Tensor]:
    steps = Steps(pipe)

    def predict(call: Call) -> Tensor:
        with ExitStack() as stack:
            for lora, strength in zip(loras, _scheduled(schedule, steps, call, len(loras)), strict=True):
                if strength:
                    stack.enter_context(injected(target, lora * strength))
            return call()

    return predict


def _switching(k: int, every: int, order: Sequence[int] | None, schedule: Schedule | None) -> Schedule:
    turn = list(order) if order is not None else list(range(k))
    if every < 1:
        raise BadRequest(f"a LoRA must stay for at least 1 step, got {every}")
    if not turn or any(not 0 <= i < k for i in turn):
        raise BadRequest(f"order must name LoRAs 0 to {k - 1}, got {turn}")

    def strengths(step: int, steps: int) -> list[float]:
        active = turn[step // every % len(turn)]
        scheduled = schedule(step, steps) if schedule is not None else [1.0] * k
        return [float(s) if i == active else 0.0 for i, s in enumerate(scheduled)]

    return strengths


def _composite(
    target: Mapping[str, nn.Module], strengths: _Strengths, shares: Tensor, chunk: int | None
) -> Callable[[Call], Tensor]:
    def predict(call: Call) -> Tensor:
        made = predictions(call, target, strengths.at(call), chunk)
        return torch.einsum("k,k...->...", shares.to(made), made)

    return predict


def _spatial(
    target: Mapping[str, nn.Module], strengths: _Strengths, regions: Sequence[Region], window: bool, chunk: int | None
) -> Callable[[Call], Tensor]:
    k = len(regions)

    @cache  # the same for every step of a picture
    def shares(grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Each region's share of every position (overlaps are averaged), and the base's, if any."""
        cover = masks(regions, grid)
        covered = cover.sum(0)
        return cover / covered.clamp_min(1), 1 - covered.clamp(max=1) if bool((covered < 1).any()) else None

    def predict(call: Call) -> Tensor:
        share, of_base = shares(call.grid)
        loras = strengths.at(call)
        if window:
            made = _in_windows(call, target, loras, windows(regions, call.grid))
            made += [call()] if of_base is not None else []
        else:
            made = list(predictions(call, target, loras if of_base is not None else loras[:k], chunk))
        weights = [*share, *([of_base] if of_base is not None else [])]
        parts = [_spread(w.to(m), call) * m for w, m in zip(weights, made, strict=True)]
        return torch.stack(parts).sum(0)

    return predict


def _in_windows(
    call: Call, target: Mapping[str, nn.Module], loras: LoraWeights, boxes: Sequence[tuple[int, int, int, int]]
) -> list[Tensor]:
    """Each LoRA's prediction on its own window, in place in a picture of zeros."""
    out = []
    for i, (top, left, height, width) in enumerate(boxes):
        with injected(target, loras[i]):
            made = call.cropped(top, left, height, width)()
        rows, columns = call.grid
        if made.ndim == 4:
            full = made.new_zeros(*made.shape[:2], rows, columns)
            full[..., top : top + height, left : left + width] = made
        else:
            grid = made.new_zeros(len(made), rows, columns, made.shape[-1])
            grid[:, top : top + height, left : left + width] = made.unflatten(1, (height, width))
            full = grid.flatten(1, 2)
        out.append(full)
    return out


def _spread(mask: Tensor, call: Call) -> Tensor:
    """[height, width] so that it multiplies a prediction."""
    return mask if call.sample.ndim == 4 else mask.flatten()[:, None]


def _shares(shares: Sequence[float] | None, k: int) -> Tensor:
    found = torch.tensor(checked_weights(shares, k))
    if not found.sum() > 0:
        raise BadRequest(f"shares of a mean must have a positive sum, got {list(shares or [])}")
    return found / found.sum()


def _regions(regions: Sequence[Region] | None, k: int) -> Sequence[Region]:
    if regions is None or len(regions) != k:
        raise BadRequest(f"spatial needs one region per LoRA: {k} LoRAs, {len(regions or [])} regions given")
    return regions


def _scheduled(schedule: Schedule, steps: Steps, call: Call, k: int) -> list[float]:
    return checked_weights(schedule(steps.at(call.timestep), steps.total), k)
