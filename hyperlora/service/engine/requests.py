"""Requests to an engine with their results, and the description of a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from PIL import Image

from hyperlora.diffusion.multi_lora import Strategy
from hyperlora.lora.io.formats import FormatChoice
from hyperlora.lora.io.keys import LoraFormat
from hyperlora.pipelines.config import GenerationConfig

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class EngineResult(Generic[ValueT]):
    """The result of one request.

    Attributes:
        value: A file as bytes, an image, or scores.
        warnings: What may be wrong with the input, one sentence each.
        notes: What to know about the result, e.g. licenses, likewise.
        lora: Facts about the file, if the result is a LoRA of photos.
    """

    value: ValueT
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    lora: "LoraFacts | None" = None


@dataclass(frozen=True)
class LoraFacts:
    """Facts about a LoRA file of photos.

    Attributes:
        format: Key names of the file.
        readers: Programs that read it whole.
        negative: The file for the negative branch of guidance; None for a model without one.
    """

    format: LoraFormat
    readers: tuple[str, ...] = ()
    negative: bytes | None = None


class EngineRequest(Generic[ValueT]):
    """A request to an engine; the type parameter is the type of its result."""


@dataclass(frozen=True)
class LoraRequest(EngineRequest[bytes]):
    """A LoRA file from photos of one subject.

    Attributes:
        photos: PNG, JPEG or WEBP files.
        config: How the LoRA is generated and written.
        title: Title in the metadata of the file.
        consent: Whether the metadata records that the subject agrees.
        method: Method of the model; None for the first model of the server.
        model: Name of the model instead.
    """

    photos: Sequence[bytes]
    config: GenerationConfig = field(default_factory=GenerationConfig)
    title: str = "LoRA"
    consent: bool = False
    method: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class EditLoraRequest(EngineRequest[bytes]):
    """A LoRA file of the edit that before/after pairs show.

    Attributes:
        pairs: Image files before and after the edit.
        strength: Factor of the LoRA; below 0 it undoes the edit.
        format: Key names of the file.
        title: Title in the metadata of the file.
        consent: Whether the metadata records that the subject agrees.
        model: Name of the model; None for the first model of the server.
        image: The image to edit, for a model whose LoRAs are for one image.
        rank: Rank of the LoRA of such a model; None for its own.
    """

    pairs: Sequence[tuple[bytes, bytes]]
    strength: float = 1.0
    format: FormatChoice = "auto"
    title: str = "edit"
    consent: bool = False
    model: str | None = None
    image: bytes | None = None
    rank: int | None = None


@dataclass(frozen=True)
class ImageSampling:
    """Settings of the sampler that all images of one batch share.

    Attributes:
        num_inference_steps: Denoising steps; None for the base's default.
        guidance_scale: Classifier-free guidance scale, likewise.
        negative_prompt: Prompt of the unconditional branch.
        scheduler: Sampler by diffusers' name; None for the base's own.
        width: Pixels; None for the base's resolution.
        height: Pixels; None for the base's resolution.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str = ""
    scheduler: str | None = None
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True)
class ImageRequest(EngineRequest[Image.Image]):
    """An image of a prompt, with any number of LoRAs.

    Attributes:
        prompt: May hold ``<lora:NAME:WEIGHT>`` for files in the server's folder.
        loras: LoRA files with their weights; None for the strength that the file recommends.
        strategy: How several LoRAs are combined.
        gamma: Scale of AutoLoRA guidance; None for none.
        regions: Left, top, right and bottom of each LoRA's box, as fractions of the image.
        windowed: Whether each box is denoised as an image of its own.
        seed: Seed of the starting noise.
        sampling: Settings of the sampler.
        negative_branch: The LoRA on the negative branch of guidance: that of the header of the only
            LoRA, the same, none, or ``negative_lora``.
        negative_lora: Its file; with ``auto`` the one that belongs to the only LoRA.
    """

    prompt: str
    loras: Sequence[tuple[bytes, float | None]] = ()
    strategy: Strategy = "merge"
    gamma: float | None = None
    regions: Sequence[tuple[float, float, float, float]] | None = None
    windowed: bool = False
    seed: int = 0
    sampling: ImageSampling = field(default_factory=ImageSampling)
    negative_branch: Literal["auto", "same", "off", "file"] = "auto"
    negative_lora: bytes | None = None


@dataclass(frozen=True)
class EditImageRequest(EngineRequest[Image.Image]):
    """An image, edited as pairs show, by a LoRA file, or by an instruction.

    Attributes:
        image: The image file to edit.
        pairs: Image files before and after the edit.
        lora: A LoRA file instead of pairs.
        strength: Factor of the LoRA; of pairs, below 0 undoes the edit.
        instruction: Edit prompt, besides the LoRA or instead of one.
        seed: Seed of the starting noise.
        num_inference_steps: Denoising steps; None for the model's own.
        preserve_unedited: Whether pixels outside the edit stay as they are.
    """

    image: bytes
    pairs: Sequence[tuple[bytes, bytes]] = ()
    lora: bytes | None = None
    strength: float = 1.0
    instruction: str = ""
    seed: int = 0
    num_inference_steps: int | None = None
    preserve_unedited: bool = True


@dataclass(frozen=True)
class SimilarityRequest(EngineRequest[list[float]]):
    """The identity similarity of images to photos of one subject.

    Attributes:
        photos: Image files of the subject, at least one.
        images: Image files to compare, at least one.
    """

    photos: Sequence[bytes]
    images: Sequence[bytes]


@dataclass(frozen=True)
class ModelInfo:
    """One model that the engine holds.
    \f
    Attributes:
        id: Name of the model in requests.
        kind: Kind of the model: image-to-lora, lora-diffusion, pair-to-lora, or of a network that
            others released: hyperlora-sdxl, i2l-v1, template or lorweb.
        base: Id of the base its LoRAs are for.
        rank: Rank of its LoRAs; null until the model is loaded, as the next two.
        num_targets: Number of modules that its LoRAs adapt.
        fingerprint: Digest of the layout of its LoRAs.
        trigger_phrase: Phrase for the subject in a prompt; may be empty.
        license: License of the model.
        resolution: Pixels per side of images of the base.
        lora_format: Key names of a file where a request leaves the format open; null until then.
        lora_readers: Programs that read such a file whole, by ``formats.READERS``.
        supports_identity_similarity: Whether /v1/identity-similarity compares its images.
        domain: Photos the model is trained on, e.g. avatars; empty if it does not know.
        device: Device that the model and its base compute on, e.g. cuda:0.
        dtype: Precision of the base, e.g. bfloat16.
        purpose: What the model is for, a few words.
        license_notice: Licenses of all parts, one sentence.
        commercial_use: Whether all parts allow commercial use.
        prompt_prefix: Words with which every prompt must begin; empty for none.
        strength: Recommended factor of its LoRAs.
        download_bytes: Bytes that the first use fetches, if they are not here yet.
        can_generate_images: Whether this server holds its base, to draw with its LoRAs.
        is_loaded: Whether it is loaded; else the first LoRA takes longer.
        max_pixel_steps: Largest product of pixels and denoising steps of one image of its base.
    """

    id: str
    kind: str
    base: str
    rank: int | None
    num_targets: int | None
    fingerprint: str | None
    trigger_phrase: str
    license: str
    resolution: int
    lora_format: LoraFormat | None
    lora_readers: tuple[str, ...] = ()
    supports_identity_similarity: bool = False
    domain: str = ""
    device: str = "cpu"
    dtype: str = "float32"
    purpose: str = ""
    license_notice: str = ""
    commercial_use: Literal["yes", "no", "unknown"] = "unknown"
    prompt_prefix: str = ""
    strength: float = 1.0
    download_bytes: int = 0
    can_generate_images: bool = True
    is_loaded: bool = True
    max_pixel_steps: int | None = None
