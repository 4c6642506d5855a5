"""``open_engine``: which models a server holds, loaded; the same call in one process and in every replica."""

from collections.abc import Callable
from dataclasses import dataclass

from hyperlora import pretrained
from hyperlora.cpu import keep_heap
from hyperlora.diffusion.diffusion_base import load_base
from hyperlora.encoders.identity_similarity import Likeness
from hyperlora.pipelines.auto import open_photo_model
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.service.engine.edits import Changes
from hyperlora.service.engine.local import LocalEngine
from hyperlora.service.settings import ServiceSettings

Observe = Callable[[str, int], None]


@dataclass(frozen=True)
class Models:
    """Folders or hub ids of the models of one server; ``others`` are models from photos of other methods. Without
    ``edits`` before/after pairs are refused; without an ``evaluator`` (the folder of a reader) the likeness of
    portraits is."""

    model: str = str(pretrained.MODEL)
    base: str = str(pretrained.BASE)
    pair_model: str = str(pretrained.PAIR_MODEL)
    edit_base: str = str(pretrained.EDIT_BASE)
    edits: bool = True
    evaluator: str | None = None
    others: tuple[str, ...] = ()


def open_engine(models: Models, settings: ServiceSettings) -> Callable[[Observe], LocalEngine]:
    """Load the models; what comes back starts an engine over them, and tells its argument of every batch.

    Raises ``HyperloraError`` for what cannot be loaded.
    """
    keep_heap()
    base = load_base(models.base)
    network, *others = (open_photo_model(name, base=base) for name in (models.model, *models.others))
    changes = None
    if models.edits:
        canvas = load_base(models.edit_base)
        changes = Changes(
            PairToLora.from_pretrained(models.pair_model, base=canvas), canvas,
            batch=settings.batch, pictures=settings.pictures,
        )  # fmt: skip

    likeness = Likeness.from_pretrained(models.evaluator) if models.evaluator else None

    def engine(observe: Observe) -> LocalEngine:
        return LocalEngine(
            network, base, settings.loras, queue=settings.queue, batch=settings.batch, pictures=settings.pictures,
            observe=observe, changes=changes, likeness=likeness, others=others,
        )  # fmt: skip

    return engine
