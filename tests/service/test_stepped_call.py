"""A call that pauses keeps its stack and torch's global states, whatever runs meanwhile."""

import pytest
import torch
from torch import Tensor

from hyperlora.service.engine.batcher import UNFINISHED
from hyperlora.service.engine.stepped_call import SteppedCall

CPU = torch.device("cpu")


class Draws:
    """A call that draws three random numbers from its own seed and pauses before each."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.call = SteppedCall(self.run, CPU)

    def run(self) -> Tensor:
        torch.manual_seed(self.seed)
        draws = []
        with torch.no_grad():
            for _ in range(3):
                self.call.pause()
                assert not torch.is_grad_enabled()
                draws.append(torch.rand(2))
        return torch.stack(draws)


def finish(*calls: SteppedCall[Tensor]) -> list[object]:
    """Advance calls in turns; return their results."""
    results: list[object] = [UNFINISHED] * len(calls)
    while UNFINISHED in results:
        for i, call in enumerate(calls):
            if results[i] is UNFINISHED:
                results[i] = call.advance()
            assert torch.is_grad_enabled()
            torch.rand(3)  # as another request does
    return results


def test_stepped_calls_draw_as_if_they_were_alone() -> None:
    (alone,), (other_alone,) = finish(Draws(1).call), finish(Draws(2).call)
    together = finish(Draws(1).call, Draws(2).call)
    assert isinstance(alone, Tensor) and isinstance(other_alone, Tensor)
    torch.testing.assert_close(together, [alone, other_alone], rtol=0, atol=0)


def test_stepped_calls_leave_the_random_state_of_others() -> None:
    state = torch.get_rng_state()
    for _ in range(4):
        torch.rand(3)
    expected = torch.get_rng_state()
    torch.set_rng_state(state)
    finish(Draws(3).call)
    assert torch.equal(torch.get_rng_state(), expected)


def test_stepped_call_raises_what_its_call_raises() -> None:
    def fail() -> None:
        call.pause()
        raise ValueError("no")

    call = SteppedCall(fail, CPU)
    assert call.advance() is UNFINISHED
    with pytest.raises(ValueError, match="no"):
        call.advance()
