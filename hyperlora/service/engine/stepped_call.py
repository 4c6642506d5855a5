"""``SteppedCall``: a long call that pauses between its steps, so that others use its thread."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from greenlet import greenlet
from torch import Tensor

from hyperlora.compute import fork_rng
from hyperlora.service.engine.batcher import UNFINISHED

ResultT = TypeVar("ResultT")


class SteppedCall(Generic[ResultT]):
    """A call with a stack of its own on the thread that advances it.

    Whatever runs while it pauses has no part in its random numbers or in its gradients: the global
    states of torch are kept apart.

    Args:
        call: The call. It calls ``pause`` where nothing of it is open on shared models.
        device: The device whose random state it uses, besides that of the CPU.
    """

    def __init__(self, call: Callable[[], ResultT], device: torch.device) -> None:
        self._greenlet = greenlet(call)
        self._device = device
        self._rng_states: list[Tensor] | None = None
        self._grad_enabled = True

    def advance(self) -> ResultT | object:
        """Run the call up to its next pause or its end.

        Returns:
            ``UNFINISHED`` after a pause, else what the call returns.
        """
        with fork_rng(self._device), torch.set_grad_enabled(self._grad_enabled):
            if self._rng_states is not None:
                self._set_rng_states(self._rng_states)
            result: ResultT | object = self._greenlet.switch()
            self._rng_states, self._grad_enabled = self._get_rng_states(), torch.is_grad_enabled()
        return result if self._greenlet.dead else UNFINISHED

    def pause(self) -> None:
        """Return control to ``advance``; called within the call."""
        assert self._greenlet.parent is not None
        self._greenlet.parent.switch(UNFINISHED)

    def _get_rng_states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states

    def _set_rng_states(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self._device)
