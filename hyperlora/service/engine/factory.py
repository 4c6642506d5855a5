"""``make_engine_factory``: which models a server holds, loaded; the same call in one process and in every replica."""

from collections.abc import Callable
from dataclasses import dataclass

from hyperlora import pretrained
from hyperlora.cpu import disable_malloc_trim
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.identity_similarity import IdentitySimilarity
from hyperlora.pipelines.auto import load_image_to_lora
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.service.engine.edits import EditEngine
from hyperlora.service.engine.local import LocalEngine
from hyperlora.service.settings import ServiceSettings

BatchCallback = Callable[[str, int], None]


@dataclass(frozen=True)
class ModelPaths:
    """Folders or hub ids of the models of one server; ``extra_models`` are models from photos of other methods. Without
    ``enable_edits`` before/after pairs are refused; without an ``evaluator`` (the folder of a reader) the likeness of
    portraits is."""

    model: str = str(pretrained.IMAGE_TO_LORA_DIR)
    base: str = str(pretrained.BASE_DIR)
    pair_model: str = str(pretrained.PAIR_TO_LORA_DIR)
    edit_base: str = str(pretrained.EDIT_BASE_DIR)
    enable_edits: bool = True
    evaluator: str | None = None
    extra_models: tuple[str, ...] = ()


def make_engine_factory(
    models: ModelPaths, settings: ServiceSettings
) -> Callable[[BatchCallback], LocalEngine]:
    """Load the models; what comes back starts an engine over them, and tells its argument of every batch.

    Raises ``HyperloraError`` for what cannot be loaded.
    """
    disable_malloc_trim()
    base = load_diffusion_base(models.base)
    photo_model, *extra_models = (
        load_image_to_lora(name, base=base) for name in (models.model, *models.extra_models)
    )
    edit_engine = None
    if models.enable_edits:
        edit_base = load_diffusion_base(models.edit_base)
        edit_engine = EditEngine(
            PairToLora.from_pretrained(models.pair_model, base=edit_base),
            edit_base,
            max_lora_batch=settings.max_lora_batch,
            max_image_batch=settings.max_image_batch,
        )

    identity_similarity = (
        IdentitySimilarity.from_pretrained(models.evaluator) if models.evaluator else None
    )

    def make_engine(on_batch: BatchCallback) -> LocalEngine:
        return LocalEngine(
            photo_model,
            base,
            settings.lora_dir,
            max_queue_size=settings.max_queue_size,
            max_lora_batch=settings.max_lora_batch,
            max_image_batch=settings.max_image_batch,
            on_batch=on_batch,
            edit_engine=edit_engine,
            identity_similarity=identity_similarity,
            extra_models=extra_models,
        )

    return make_engine
