"""``describe_model``: the ``ModelInfo`` of a loaded model."""

from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.lora.io.formats import list_readers, resolve_format
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase
from hyperlora.pipelines.photo_model import AnyPhotoModel
from hyperlora.pipelines.pretrained_model import PretrainedModel
from hyperlora.service.engine.requests import ModelInfo


def describe_model(
    kind: str,
    model: PretrainedModel | AnyPhotoModel,
    base: DiffusionBase,
    supports_identity_similarity: bool = False,
) -> ModelInfo:
    """Describe a model and its base.

    Args:
        kind: What the API calls the kind of the model.
        model: A loaded model from photos or from pairs.
        base: The base that its LoRAs are for.
        supports_identity_similarity: Whether the engine has an evaluator for its images.

    Returns:
        The facts that GET /v1/models lists.
    """
    layout, card = model.layout, model.card
    detector = model.ood_detector if isinstance(model, ImageToLoraBase) else None
    lora_format = resolve_format("auto", layout, base.family.architecture)
    return ModelInfo(
        id=kind,
        kind=kind,
        base=layout.base,
        rank=layout.rank,
        num_targets=len(layout.targets),
        fingerprint=layout.fingerprint,
        trigger_phrase=card.trigger_phrase,
        license=card.license,
        resolution=base.resolution,
        lora_format=lora_format,
        lora_readers=list_readers(layout, lora_format, base.family.architecture),
        supports_identity_similarity=supports_identity_similarity,
        domain=detector.domain_name if detector is not None else "",
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
    )
