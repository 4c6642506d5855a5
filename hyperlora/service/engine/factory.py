"""``make_engine_factory``: load the models of a server, in one process or in every replica."""

from dataclasses import dataclass

from hyperlora import pretrained
from hyperlora.compute import ComputeConfig
from hyperlora.cpu import disable_malloc_trim
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.identity_similarity import IdentitySimilarity
from hyperlora.pipelines.auto import load_image_to_lora
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.service.engine.base import EngineFactory
from hyperlora.service.engine.callbacks import BatchCallback
from hyperlora.service.engine.edits import EditEngine
from hyperlora.service.engine.local import LocalEngine
from hyperlora.service.settings import ServiceSettings


@dataclass(frozen=True)
class ModelPaths:
    """Folders or hub ids of the models of one server.

    Attributes:
        model: Model from photos that serves requests without a method.
        base: Base of the models from photos.
        pair_model: Model from before/after pairs.
        edit_base: InstructPix2Pix base of the model from pairs.
        enable_edits: Whether the server takes before/after pairs.
        evaluator: Attribute classifier for identity similarity; None refuses such requests.
        extra_models: Models from photos of other methods.
    """

    model: str = str(pretrained.IMAGE_TO_LORA_DIR)
    base: str = str(pretrained.BASE_DIR)
    pair_model: str = str(pretrained.PAIR_TO_LORA_DIR)
    edit_base: str = str(pretrained.EDIT_BASE_DIR)
    enable_edits: bool = True
    evaluator: str | None = None
    extra_models: tuple[str, ...] = ()


def make_engine_factory(
    paths: ModelPaths, settings: ServiceSettings, compute: ComputeConfig | None = None
) -> EngineFactory:
    """Load the models of a server.

    Args:
        paths: Which models.
        settings: Sizes of the queue and of batches, and the folder of LoRA files.
        compute: Device, precision and memory; None for what ``ComputeConfig`` finds by itself.

    Returns:
        A function that starts an engine over the models.

    Raises:
        HyperloraError: If a model cannot be loaded.
    """
    disable_malloc_trim()
    limits, compute = settings.engine_limits, compute or ComputeConfig()
    base = load_diffusion_base(paths.base, compute)
    photo_model, *extra_models = (
        load_image_to_lora(name, base=base, compute=compute)
        for name in (paths.model, *paths.extra_models)
    )
    edit_engine = None
    if paths.enable_edits:
        edit_base = load_diffusion_base(paths.edit_base, compute)
        pair_model = PairToLora.from_pretrained(paths.pair_model, base=edit_base, compute=compute)
        edit_engine = EditEngine(pair_model, edit_base, limits)
    identity_similarity = None
    if paths.evaluator:
        identity_similarity = IdentitySimilarity.from_pretrained(paths.evaluator)
        identity_similarity.to(compute.torch_device)

    def make_engine(on_batch: BatchCallback) -> LocalEngine:
        return LocalEngine(
            photo_model,
            base,
            settings.lora_dir,
            limits=limits,
            on_batch=on_batch,
            edit_engine=edit_engine,
            identity_similarity=identity_similarity,
            extra_models=extra_models,
        )

    return make_engine
