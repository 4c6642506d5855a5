"""``open_engine``: which models a server holds, loaded; the same call in one process and in every replica."""

from collections.abc import Callable
from dataclasses import dataclass

from hyperlora import bundle
from hyperlora.heap import keep_heap
from hyperlora.pipelines import ImageToLora, PairToLora, load_base
from hyperlora.service.changes import Changes
from hyperlora.service.engine import LocalEngine
from hyperlora.service.settings import ServiceSettings

Observe = Callable[[str, int], None]


@dataclass(frozen=True)
class Models:
    """Folders or hub ids of the models of one server. Without ``edits`` before/after pairs are refused."""

    model: str = str(bundle.MODEL)
    base: str = str(bundle.BASE)
    pair_model: str = str(bundle.PAIR_MODEL)
    edit_base: str = str(bundle.EDIT_BASE)
    edits: bool = True


def open_engine(models: Models, settings: ServiceSettings) -> Callable[[Observe], LocalEngine]:
    """Load the models; what comes back starts an engine over them, and tells its argument of every batch.

    Raises ``HyperloraError`` for what cannot be loaded.
    """
    keep_heap()
    base = load_base(models.base)
    network = ImageToLora.from_pretrained(models.model, base=base)
    changes = None
    if models.edits:
        canvas = load_base(models.edit_base)
        changes = Changes(
            PairToLora.from_pretrained(models.pair_model, base=canvas), canvas,
            batch=settings.batch, pictures=settings.pictures,
        )  # fmt: skip

    def engine(observe: Observe) -> LocalEngine:
        return LocalEngine(
            network, base, settings.loras, queue=settings.queue, batch=settings.batch, pictures=settings.pictures,
            observe=observe, changes=changes,
        )  # fmt: skip

    return engine
