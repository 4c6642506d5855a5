"""``Shutdown``: the end of a server, which gives accepted work some seconds."""

import asyncio
import threading
import time

from hyperlora.service.engine.base import Engine
from hyperlora.service.jobs import Jobs


class Shutdown:
    """Ends the work of a server: what is not done in time ends between two of its steps.

    Args:
        engine: The models.
        jobs: Accepted jobs.
        timeout_s: Seconds that accepted requests and jobs get.
    """

    def __init__(self, engine: Engine, jobs: Jobs, timeout_s: float) -> None:
        self.engine, self.jobs, self.timeout_s = engine, jobs, timeout_s
        self._deadline: float | None = None

    def begin(self) -> None:
        """End event streams, and start the time of accepted work; later calls do nothing."""
        if self._deadline is not None:
            return
        self._deadline = time.monotonic() + self.timeout_s
        self.jobs.close_streams()
        asyncio.get_running_loop().call_later(self.timeout_s, self._end_work)

    async def finish(self) -> None:
        """Let jobs use what is left of the time, and end everything."""
        self.begin()
        assert self._deadline is not None
        await self.jobs.drain(max(0.0, self._deadline - time.monotonic()))
        self.engine.close(0.0)

    def _end_work(self) -> None:
        """Refuse what waits or runs, without waiting for it; threads of a pool may all be busy."""
        threading.Thread(target=self.engine.close, args=(0.0,), daemon=True).start()
