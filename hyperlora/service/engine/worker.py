"""``ModelWorker``: the threads that the requests of one engine share."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from hyperlora.service.engine.batcher import BatchSpec, DynamicBatcher, PayloadT, ResultT
from hyperlora.service.engine.callbacks import BatchCallback

SourceT = TypeVar("SourceT")
DecodedT = TypeVar("DecodedT")

MAX_DECODERS: Final = 2
"""Images and LoRA files that are decoded at a time; it bounds memory, not the queue."""


class ModelWorker:
    """The model thread of one engine, and the slots of its decoders.

    Args:
        max_queue_size: Payloads that may wait for the model thread.
        on_batch: Called on the model thread with the kind and size of every batch.
    """

    def __init__(self, max_queue_size: int, on_batch: BatchCallback | None = None) -> None:
        self.batcher = DynamicBatcher(max_queue_size, on_batch)
        self.decoder_slots = threading.Semaphore(MAX_DECODERS)

    async def run_in_batch(
        self, spec: BatchSpec[PayloadT, ResultT], payload: PayloadT, timeout_s: float
    ) -> ResultT:
        """Run one payload on the model thread, in a batch with others of an equal spec.

        Args:
            spec: The kind of work.
            payload: What ``spec.run`` takes one of.
            timeout_s: Seconds the payload may wait in the queue.

        Returns:
            The result of this payload.

        Raises:
            QueueFullError: If too many payloads wait.
            DeadlineExceededError: If the turn of the payload does not come in time.
        """
        return await asyncio.wrap_future(self.batcher.submit(spec, payload, timeout_s))

    async def decode_all(
        self, decode: Callable[[SourceT], DecodedT], sources: Sequence[SourceT]
    ) -> list[DecodedT]:
        """Decode files in another thread, one after the other, each in a decoder slot.

        Args:
            decode: Decodes one source.
            sources: Files as bytes, or pairs of files.

        Returns:
            One decoded object per source.
        """
        return await asyncio.to_thread(self._decode_in_slots, decode, sources)

    def _decode_in_slots(
        self, decode: Callable[[SourceT], DecodedT], sources: Sequence[SourceT]
    ) -> list[DecodedT]:
        decoded = []
        for source in sources:
            with self.decoder_slots:
                decoded.append(decode(source))
        return decoded
