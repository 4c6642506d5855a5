"""``describe_model``: the ``ModelInfo`` of a model."""

from typing import Final

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.lora.io.architectures import find_architecture
from hyperlora.lora.io.formats import list_readers, resolve_format
from hyperlora.lora.layout import LoraLayout
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase
from hyperlora.pipelines.photo_model import AnyPhotoModel
from hyperlora.pipelines.pretrained_model import PretrainedModel
from hyperlora.pipelines.released.cards import ReleasedCard
from hyperlora.service.engine.photo_models import PhotoModels, PhotoModelSource
from hyperlora.service.engine.requests import ModelInfo

_PERMISSIVE_LICENSES: Final = frozenset({"apache-2.0", "mit", "bsd-3-clause", "cc0-1.0"})


def describe_model(
    kind: str,
    model: PretrainedModel | AnyPhotoModel,
    base: DiffusionBase,
    supports_identity_similarity: bool = False,
    name: str = "",
) -> ModelInfo:
    """Describe a model of hyperlora and the base of the server.

    Args:
        kind: What the API calls the kind of the model.
        model: A loaded model from photos or from pairs.
        base: The base that its LoRAs are for.
        supports_identity_similarity: Whether the engine has an evaluator for its images.
        name: What requests call the model; its kind if empty.

    Returns:
        The facts that GET /v1/models lists.
    """
    layout, card = model.layout, model.card
    detector = model.ood_detector if isinstance(model, ImageToLoraBase) else None
    is_served = layout.base == base.id
    architecture = base.family.architecture if is_served else card.architecture
    lora_format = resolve_format("auto", layout, architecture)
    is_permissive = card.license.lower() in _PERMISSIVE_LICENSES
    return ModelInfo(
        id=name or kind,
        kind=kind,
        base=layout.base,
        rank=layout.rank,
        num_targets=len(layout.targets),
        fingerprint=layout.fingerprint,
        trigger_phrase=card.trigger_phrase,
        license=card.license,
        resolution=base.resolution if is_served else card.resolution or base.resolution,
        lora_format=lora_format,
        lora_readers=list_readers(layout, lora_format, architecture),
        supports_identity_similarity=supports_identity_similarity and is_served,
        domain=detector.domain_name if detector is not None else "",
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
        license_notice=f"license: {card.license}" if card.license else "",
        commercial_use="yes" if is_permissive else "unknown",
        can_generate_images=is_served,
    )


def describe_source(
    source: PhotoModelSource,
    models: PhotoModels,
    base: DiffusionBase,
    supports_identity_similarity: bool = False,
) -> ModelInfo:
    """Describe a model from photos, loaded or not.

    Args:
        source: The model.
        models: All models from photos of the server.
        base: The base that the server draws with.
        supports_identity_similarity: Whether the engine has an evaluator for images of the base.

    Returns:
        The facts that GET /v1/models lists.
    """
    model, facts = models.find_in_memory(source), source.facts
    if facts is None:
        assert model is not None  # a model of hyperlora stays loaded
        return describe_model(source.kind, model, base, supports_identity_similarity, source.name)
    is_layout_known = model is not None and (source.kind != "template" or "layout" in vars(model))
    layout = model.layout if model is not None and is_layout_known else None
    can_generate_images = matches_base(facts, base)
    return describe_card(
        source.name,
        facts,
        layout,
        base,
        can_generate_images=can_generate_images,
        is_loaded=model is not None,
    )


def describe_card(
    name: str,
    facts: ReleasedCard,
    layout: LoraLayout | None,
    base: DiffusionBase,
    *,
    can_generate_images: bool = False,
    is_loaded: bool = False,
) -> ModelInfo:
    """Describe a network that others released, by its card.

    Args:
        name: What requests call it.
        facts: The card.
        layout: The layout of its LoRAs; None if it is not known before it is loaded.
        base: The base that the server draws with.
        can_generate_images: Whether that is the network's.
        is_loaded: Whether the network is loaded.

    Returns:
        The facts that GET /v1/models lists.
    """
    lora_format = resolve_format("auto", layout, facts.architecture) if layout else None
    readers = (
        list_readers(layout, lora_format, facts.architecture) if layout and lora_format else ()
    )
    return ModelInfo(
        id=name,
        kind=facts.kind,
        base=facts.base,
        rank=layout.rank if layout else None,
        num_targets=len(layout.targets) if layout else None,
        fingerprint=layout.fingerprint if layout else None,
        trigger_phrase=facts.make_model_card().trigger_phrase,
        license=facts.network_license,
        resolution=facts.resolution,
        lora_format=lora_format,
        lora_readers=readers,
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
        purpose=facts.purpose,
        license_notice=facts.format_notice(),
        commercial_use=facts.commercial_use,
        prompt_prefix=facts.trigger_phrase,
        strength=facts.strength,
        download_bytes=facts.download_bytes,
        can_generate_images=can_generate_images,
        is_loaded=is_loaded,
    )


def matches_base(facts: ReleasedCard, base: DiffusionBase) -> bool:
    """Return whether a base is of the architecture that a released network's LoRAs are for.

    Args:
        facts: The card of the network.
        base: The base that the server draws with.
    """
    names = (facts.architecture, base.family.architecture)
    needed, served = (find_architecture(name) for name in names)
    if needed is None or served is None:
        return bool(facts.architecture) and names[0] == names[1]
    return needed.group == served.group
