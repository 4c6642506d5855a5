"""``make_engine_factory``: load the models of a server, in one process or in every replica."""

from dataclasses import dataclass, replace
from functools import partial

from diffusers.utils import logging

from hyperlora import pretrained
from hyperlora.compute import ComputeConfig
from hyperlora.cpu import disable_malloc_trim
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.encoders.identity_similarity import IdentitySimilarity
from hyperlora.errors import InvalidArgumentError, LayoutMismatchError
from hyperlora.pipelines.auto import is_own_model, load_image_to_lora
from hyperlora.pipelines.pair_to_lora import PairToLora
from hyperlora.pipelines.released.registry import open_released_model
from hyperlora.pipelines.released.released_model import ReleasedOptions
from hyperlora.service.engine.base import EngineFactory
from hyperlora.service.engine.callbacks import BatchCallback
from hyperlora.service.engine.edits import EditEngine
from hyperlora.service.engine.local import LocalEngine
from hyperlora.service.engine.photo_models import (
    DEFAULT_MAX_LOADED,
    PhotoModelSource,
    find_named_value,
    name_repository,
    parse_named_value,
)
from hyperlora.service.engine.sheet_models import SheetModelSource, open_sheet_model
from hyperlora.service.settings import ServiceSettings


@dataclass(frozen=True)
class ModelPaths:
    """Folders or hub ids of the models of one server.

    Attributes:
        model: Model from photos that serves requests that name none; also ``NAME=FOLDER``.
        base: Base of the models from photos, with which the server draws.
        pair_model: Model from before/after pairs.
        edit_base: InstructPix2Pix base of the model from pairs.
        enable_edits: Whether the server takes before/after pairs.
        evaluator: Attribute classifier for identity similarity; None refuses such requests.
        extra_models: Further models from photos, likewise, and networks that make the LoRA of a
            pair's edit for one image (LoRWeB).
        revisions: Branches, tags or commits on the hub of networks that others released,
            ``REVISION`` or ``NAME=REVISION``.
        encoders: Image encoders of networks that others released, ``FOLDER`` or ``NAME=FOLDER``.
        trusted_code: SHA-256 of the code of templates that may run, ``SHA256`` or ``NAME=SHA256``.
        face_pack: Face pack of networks that others released; None for their own.
        fetch: Whether networks that others released may be fetched.
        max_loaded_models: Networks that others released and that are loaded at a time.
    """

    model: str = str(pretrained.IMAGE_TO_LORA_DIR)
    base: str = str(pretrained.BASE_DIR)
    pair_model: str = str(pretrained.PAIR_TO_LORA_DIR)
    edit_base: str = str(pretrained.EDIT_BASE_DIR)
    enable_edits: bool = True
    evaluator: str | None = None
    extra_models: tuple[str, ...] = ()
    revisions: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ()
    trusted_code: tuple[str, ...] = ()
    face_pack: str | None = None
    fetch: bool = True
    max_loaded_models: int = DEFAULT_MAX_LOADED


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
    logging.set_verbosity_error()  # diffusers quotes prompts that are too long
    limits, compute = settings.engine_limits, compute or ComputeConfig()
    base = load_diffusion_base(paths.base, compute)
    sources = [
        _open_source(text, paths, base, compute) for text in (paths.model, *paths.extra_models)
    ]
    sheet_models = [source for source in sources if isinstance(source, SheetModelSource)]
    photo_model, *extra_models = (
        source for source in sources if isinstance(source, PhotoModelSource)
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
            max_loaded_models=paths.max_loaded_models,
            sheet_models=sheet_models,
        )

    return make_engine


def _open_source(
    text: str, paths: ModelPaths, base: DiffusionBase, compute: ComputeConfig
) -> PhotoModelSource | SheetModelSource:
    """Load a model of hyperlora, or recognize a network that others released."""
    name, name_or_path = parse_named_value(text)
    if is_own_model(name_or_path):
        try:
            model = load_image_to_lora(name_or_path, base=base, compute=compute)
        except LayoutMismatchError:
            if text == paths.model:
                raise
            model = load_image_to_lora(name_or_path, compute=compute)  # without images of it
        return PhotoModelSource.from_model(model, name)
    revision = find_named_value(paths.revisions, name or name_repository(name_or_path))
    options = ReleasedOptions(revision=revision, offline=not paths.fetch, face_pack=paths.face_pack)
    sheet_source = SheetModelSource.from_release(name_or_path, name, options, compute)
    if sheet_source is not None:
        if text == paths.model:
            raise InvalidArgumentError(
                f"{name_or_path!r} makes LoRAs of edits: the first --model is one from photos"
            )
        encoder = find_named_value(paths.encoders, sheet_source.name)
        options = replace(options, encoder=encoder)
        return replace(sheet_source, load=partial(open_sheet_model, name_or_path, options, compute))
    source = PhotoModelSource.from_release(name_or_path, name, options, compute)
    options = replace(
        options,
        encoder=find_named_value(paths.encoders, source.name),
        trust_remote_code=find_named_value(paths.trusted_code, source.name),
    )
    return replace(source, load=partial(open_released_model, name_or_path, options, compute))
