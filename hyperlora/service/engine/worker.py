"""``ModelWorker``: the threads that the requests of one engine share."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from copy import copy
from typing import Final, TypeVar

from PIL import Image

from hyperlora.service.engine.batcher import BatchSpec, DynamicBatcher, PayloadT, ResultT
from hyperlora.service.engine.callbacks import BatchCallback
from hyperlora.service.engine.decoder_pool import DecoderPool
from hyperlora.service.settings import EngineLimits

PreparedT = TypeVar("PreparedT")

MAX_LORA_FILES: Final = 2
"""LoRA files that are read at a time; it bounds memory, not the queue."""


class ModelWorker:
    """The model thread of one engine, a thread for other processes, its decoders of images, and
    slots for LoRA files.

    The code of a template runs in a process of its own. One thread waits for these processes, so
    that there is one at a time, and other requests go on.

    Args:
        limits: Payloads that may wait for either thread.
        on_batch: Called on either thread with the kind and size of every batch.
    """

    def __init__(self, limits: EngineLimits, on_batch: BatchCallback | None = None) -> None:
        self.batcher, self.process_batcher = (
            DynamicBatcher(
                limits.max_queue_size, on_batch, thread_name, limits.max_queue_size_per_owner
            )
            for thread_name in ("hyperlora-model", "hyperlora-processes")
        )
        self.owner = ""
        self.decoder_slots = threading.Semaphore(MAX_LORA_FILES)
        self.decoder_pool = DecoderPool()

    @property
    def is_alive(self) -> bool:
        """Whether both threads run and take payloads."""
        return self.batcher.is_alive and self.process_batcher.is_alive

    @property
    def queue_length(self) -> int:
        """Number of payloads that wait for either thread."""
        return self.batcher.queue_length + self.process_batcher.queue_length

    def for_owner(self, owner: str) -> "ModelWorker":
        """Return the same threads and slots for the requests of one owner, who takes turns."""
        worker = copy(self)
        worker.owner = owner
        return worker

    def check_running(self) -> None:
        """Raise if nobody waits for what the model thread runs; see ``DynamicBatcher``."""
        self.batcher.check_running()

    def close(self, timeout_s: float) -> None:
        """Finish what waits, and end both threads and the decoders.

        Args:
            timeout_s: Seconds for both; what still waits or runs then is refused.
        """
        end_time = time.monotonic() + timeout_s
        for batcher in (self.batcher, self.process_batcher):
            batcher.close(max(0.0, end_time - time.monotonic()))
        self.decoder_pool.close()

    async def run_in_batch(
        self, spec: BatchSpec[PayloadT, ResultT], payload: PayloadT, timeout_s: float
    ) -> ResultT:
        """Run one payload on the thread of its spec, in a batch with others of an equal spec.

        Args:
            spec: The kind of work.
            payload: What ``spec.run`` takes one of.
            timeout_s: Seconds until the payload is refused, in the queue or at its next step.

        Returns:
            The result of this payload.

        Raises:
            QueueFullError: If too many payloads wait, or the server stops.
            DeadlineExceededError: If the payload is not done in time.
        """
        batcher = self.process_batcher if spec.in_own_process else self.batcher
        return await asyncio.wrap_future(batcher.submit(spec, payload, timeout_s, self.owner))

    async def decode_images(
        self, files: Sequence[bytes], prepare: Callable[[list[Image.Image]], PreparedT]
    ) -> PreparedT:
        """Decode images in other processes, and prepare them for a model in another thread.

        Args:
            files: PNG, JPEG or WEBP files of callers.
            prepare: Makes what the model needs of the decoded images.

        Returns:
            What ``prepare`` returns.

        Raises:
            InvalidImageError: An image is damaged, too large or takes too long.
            QueueFullError: If too many wait, or an image takes long while others wait.
        """
        return await asyncio.wrap_future(self.decoder_pool.submit(files, prepare, self.owner))

    async def prepare_each(
        self, files: Sequence[bytes], prepare: Callable[[Image.Image], PreparedT]
    ) -> list[PreparedT]:
        """Decode and prepare images one after the other; see ``decode_images``.

        Args:
            files: PNG, JPEG or WEBP files of callers.
            prepare: Makes what the model needs of one decoded image.

        Returns:
            One prepared image per file.
        """
        return [
            await self.decode_images([file], lambda images: prepare(images[0])) for file in files
        ]
