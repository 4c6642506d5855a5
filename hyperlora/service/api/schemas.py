"""JSON bodies of requests and responses, as OpenAPI shows them."""

from typing import Annotated, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, StringConstraints

from hyperlora.diffusion.multi_lora import Strategy
from hyperlora.lora.io.keys import LoraFormat
from hyperlora.seeds import MAX_SEED
from hyperlora.service.job_table import JobKind, JobState

FileId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 of a stored file."""
JobId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
"""Id of a job."""
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""A number from 0 to 1."""
Weight = Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]
"""A factor of a LoRA."""


class LoraResponse(BaseModel):
    """A LoRA, as JSON."""

    sha256: FileId
    size: int = Field(description="Bytes of the file.")
    format: LoraFormat
    stored: bool = Field(description="Whether GET /v1/loras/{sha256} finds it.")
    content: str = Field(description="The .safetensors file, base64.")
    notes: list[str] = Field(
        default_factory=list, description="Licenses of the model, and how to use the LoRA."
    )
    negative_sha256: FileId | None = Field(
        None, description="Of the LoRA for the negative branch of guidance, if there is one."
    )
    negative_content: str | None = Field(None, description="That file, base64.")


class LoraRef(BaseModel):
    """A LoRA of an image: the id of a stored one, or a file's content."""

    model_config = ConfigDict(extra="forbid")

    id: FileId | None = None
    content: Base64Bytes | None = Field(None, description="A .safetensors file, base64.")
    weight: Weight | None = Field(
        None, description="By default the strength that the file recommends, else 1."
    )


class ImageRequestBody(BaseModel):
    """What to generate."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, StringConstraints(max_length=1000)] = Field(
        description="May hold <lora:NAME:WEIGHT> for LoRAs in the server's folder.",
        examples=["a portrait of sks person, smiling"],
    )
    loras: list[LoraRef] = Field(default_factory=list, max_length=8)
    strategy: Strategy = "merge"
    gamma: Annotated[float, Field(ge=-5, le=5, allow_inf_nan=False)] | None = Field(
        None, description="AutoLoRA guidance: 0 is the base, 1 the LoRA, more goes beyond."
    )
    regions: list[tuple[Fraction, Fraction, Fraction, Fraction]] | None = Field(
        None, max_length=8, description="Left, top, right, bottom for each LoRA (strategy spatial)."
    )
    windowed: bool = Field(False, description="Denoise each region as an image of its own.")
    negative_prompt: Annotated[str, StringConstraints(max_length=1000)] = ""
    negative_lora: Literal["same", "off"] | LoraRef | None = Field(
        None,
        description="The LoRA on the negative branch of guidance; by default what the header of "
        "the only LoRA asks for, else the same.",
    )
    seed: int = Field(0, ge=0, le=MAX_SEED)
    num_inference_steps: int | None = Field(
        None, ge=1, le=50, description="Denoising steps; the base's default if not given."
    )
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None, ge=0, le=30, description="1 is no guidance; the base's default if not given."
    )
    scheduler: Annotated[str, StringConstraints(max_length=64)] | None = Field(
        None, description="Sampler by diffusers' name, e.g. LCM; the base's own if not given."
    )
    width: int | None = Field(None, ge=64, le=1024, multiple_of=8)
    height: int | None = Field(None, ge=64, le=1024, multiple_of=8)


class ImageResponse(BaseModel):
    """An image, as JSON."""

    sha256: FileId
    seed: int
    content: str = Field(description="The PNG, base64.")


class SimilarityResponse(BaseModel):
    """Identity similarity to the photos: 0 for anyone, 1 for another photo of the subject."""

    mean_similarity: float = Field(description="The mean over the images.")
    similarities: list[float] = Field(description="One for each image, in the order sent.")


class JobInfo(BaseModel):
    """Work accepted with ``Prefer: respond-async``."""

    id: JobId
    kind: JobKind
    state: JobState
    progress: float
    created: float = Field(description="Seconds since 1970.")
    finished: float | None
    result: str | None = Field(description="Path of the stored file, once it is there.")
    error: str | None


class Health(BaseModel):
    """``ok``, or why not."""

    status: str
    queue_length: int
    active_jobs: int
