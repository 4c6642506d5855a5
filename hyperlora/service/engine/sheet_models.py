"""``SheetEngine``: LoRAs of an edit for one image, by networks that others released (LoRWeB)."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image

from hyperlora.compute import ComputeConfig
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.formats import list_readers, resolve_format
from hyperlora.lora.io.lora import Lora
from hyperlora.lora.weights import LoraWeights
from hyperlora.pipelines.released.cards import ReleasedCard, find_card
from hyperlora.pipelines.released.hub_files import open_files
from hyperlora.pipelines.released.lorweb import LorwebModel, make_sheet
from hyperlora.pipelines.released.recognize import recognize
from hyperlora.pipelines.released.released_model import ReleasedOptions
from hyperlora.service.engine.batcher import BatchSpec
from hyperlora.service.engine.lora_files import list_format_warnings, make_consent_metadata
from hyperlora.service.engine.photo_models import name_repository
from hyperlora.service.engine.requests import EditLoraRequest, EngineResult, LoraFacts
from hyperlora.service.engine.worker import ModelWorker


@dataclass(frozen=True)
class SheetModelSource:
    """A network that makes the LoRA of a pair's edit for one image, loaded at its first use.

    Attributes:
        name: Its short name in requests.
        facts: Its card.
        load: Opens it; fetches what is not here.
    """

    name: str
    facts: ReleasedCard
    load: Callable[[], LorwebModel]

    @classmethod
    def from_release(
        cls,
        name_or_path: str,
        name: str = "",
        options: ReleasedOptions | None = None,
        compute: ComputeConfig | None = None,
    ) -> "SheetModelSource | None":
        """Recognize such a network; nothing but headers is read.

        Args:
            name_or_path: Folder or hub id.
            name: Its short name; by default that of the repository.
            options: Where its parts come from.
            compute: Device and precision.

        Returns:
            The source; None for a network of another kind.

        Raises:
            ModelLoadError: The network is unknown or incomplete.
        """
        options = options or ReleasedOptions()
        files = open_files(name_or_path, options.revision, options.offline)
        recognition = recognize(files)
        if recognition.kind != LorwebModel.kind:
            return None
        load = partial(open_sheet_model, name_or_path, options, compute)
        return cls(name or name_repository(files.name), find_card(LorwebModel.kind), load)


def open_sheet_model(
    name_or_path: str, options: ReleasedOptions, compute: ComputeConfig | None = None
) -> LorwebModel:
    """Open a network that makes the LoRA of a pair's edit for one image.

    Args:
        name_or_path: Folder or hub id.
        options: Where its parts come from.
        compute: Device and precision; None for the CPU.

    Returns:
        The network.

    Raises:
        ModelLoadError: A file is missing, not whole or of another network.
    """
    files = open_files(name_or_path, options.revision, options.offline)
    return LorwebModel.from_files(files, recognize(files), options, compute)


class SheetEngine:
    """The networks of one server that make LoRAs of edits for one image.

    Args:
        sources: The networks, at least one.
    """

    def __init__(self, sources: Sequence[SheetModelSource]) -> None:
        self.sources = {source.name: source for source in sources}
        self._models: dict[str, LorwebModel] = {}
        self._lock = threading.Lock()
        self._loader = ThreadPoolExecutor(1, "hyperlora-loader")

    def find_in_memory(self, source: SheetModelSource) -> LorwebModel | None:
        """Return a network if it is loaded."""
        return self._models.get(source.name)

    def close(self) -> None:
        """Load no further network."""
        self._loader.shutdown(wait=False, cancel_futures=True)

    async def create_lora(
        self, request: EditLoraRequest, worker: ModelWorker, timeout_s: float
    ) -> EngineResult[bytes]:
        """Create the LoRA of an edit for one image.

        Args:
            request: One pair, the image and settings.
            worker: Runs the network and the decoders.
            timeout_s: Seconds that the request may wait in the queue.

        Returns:
            The bytes of a ``.safetensors`` file, in half precision.

        Raises:
            InvalidArgumentError: There is no such model, more than one pair, or no image.
        """
        source = self._find(request)
        loop = asyncio.get_running_loop()
        model = await loop.run_in_executor(self._loader, self._load, source)
        before, after = request.pairs[0] if request.strength >= 0 else request.pairs[0][::-1]
        images = [before, after, request.image or b""]
        sheet = await worker.decode_images(images, lambda decoded: make_sheet(*decoded))
        spec = BatchSpec("edit-lora", partial(_generate_batch, model, request.rank), source.name)
        weights = await worker.run_in_batch(spec, sheet, timeout_s)
        extra = make_consent_metadata(request.consent)
        metadata = model.make_metadata(request.title, images, **extra)
        lora = Lora(weights * abs(request.strength), metadata)
        data = await asyncio.to_thread(lora.serialize, format=request.format, dtype=torch.float16)
        architecture = metadata.architecture
        file_format = resolve_format(request.format, weights.layout, architecture)
        return EngineResult(
            data,
            list_format_warnings(weights.layout, request.format, architecture),
            source.facts.list_notes(),
            LoraFacts(file_format, list_readers(weights.layout, file_format, architecture)),
        )

    def _find(self, request: EditLoraRequest) -> SheetModelSource:
        """Find the model of a request that suits it."""
        name = request.model or next(iter(self.sources))
        if name not in self.sources:
            raise InvalidArgumentError(
                f"this server has no model {name!r} for pairs: it has {', '.join(self.sources)}"
            )
        if len(request.pairs) != 1 or request.image is None:
            raise InvalidArgumentError(
                f"{name!r} makes the LoRA of one pair for one image: send one before, one after "
                f"and image, got {len(request.pairs)} pairs and "
                f"{'no' if request.image is None else 'one'} image"
            )
        return self.sources[name]

    def _load(self, source: SheetModelSource) -> LorwebModel:
        with self._lock:
            if source.name not in self._models:
                self._models[source.name] = source.load()
            return self._models[source.name]


def _generate_batch(
    model: LorwebModel, rank: int | None, sheets: Sequence[Image.Image]
) -> list[LoraWeights]:
    """Generate the LoRA of each sheet, on the CPU."""
    return [model.generate(sheet, rank).to("cpu") for sheet in sheets]
