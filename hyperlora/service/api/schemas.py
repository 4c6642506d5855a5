"""What goes over the wire, as OpenAPI shows it."""

from typing import Annotated, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, StringConstraints

FileId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 of a kept file."""
JobId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]


class LoraResponse(BaseModel):
    """A LoRA, as JSON."""

    sha256: FileId
    size: int = Field(description="Bytes of the file.")
    format: Literal["diffusers", "kohya", "sgm"]
    stored: bool = Field(description="Whether GET /v1/loras/{sha256} finds it.")
    content: str = Field(description="The .safetensors file, base64.")


class LoraRef(BaseModel):
    """A LoRA to draw with: the id of a kept one, or a file's content."""

    model_config = ConfigDict(extra="forbid")

    id: FileId | None = None
    content: Base64Bytes | None = Field(None, description="A .safetensors file, base64.")
    weight: Weight = 1.0


class ImageRequestBody(BaseModel):
    """What to draw."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, StringConstraints(max_length=1000)] = Field(
        description="May hold <lora:NAME:WEIGHT> for LoRAs in the server's folder.",
        examples=["a portrait of sks person, smiling"],
    )
    loras: list[LoraRef] = Field(default_factory=list, max_length=8)
    strategy: Literal["merge", "switch", "composite", "spatial"] = "merge"
    gamma: Annotated[float, Field(ge=-5, le=5, allow_inf_nan=False)] | None = Field(
        None, description="AutoLoRA guidance: 0 is the base, 1 the LoRA, more goes beyond."
    )
    regions: list[tuple[Fraction, Fraction, Fraction, Fraction]] | None = Field(
        None, max_length=8, description="Left, top, right, bottom for each LoRA (strategy spatial)."
    )
    windowed: bool = Field(False, description="Draw each region as a picture of its own.")
    negative_prompt: Annotated[str, StringConstraints(max_length=1000)] = ""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    num_inference_steps: int = Field(20, ge=1, le=50)
    guidance_scale: Annotated[float, Field(ge=0, le=30, allow_inf_nan=False)] = 3.0
    width: int | None = Field(None, ge=64, le=1024, multiple_of=8)
    height: int | None = Field(None, ge=64, le=1024, multiple_of=8)


class ImageResponse(BaseModel):
    """A picture, as JSON."""

    sha256: FileId
    seed: int
    content: str = Field(description="The PNG, base64.")


class SimilarityResponse(BaseModel):
    """How much pictures show the person of the photos: 0 is anyone, 1 another real photo of the same person."""

    mean_similarity: float = Field(description="The mean of all pictures.")
    similarities: list[float] = Field(description="Of each picture, in the order sent.")


class JobInfo(BaseModel):
    """Work accepted with ``Prefer: respond-async``."""

    id: JobId
    kind: Literal["lora", "image"]
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    progress: float
    created: float = Field(description="Seconds since 1970.")
    finished: float | None
    result: str | None = Field(description="Path of what was made, once it is there.")
    error: str | None


class Health(BaseModel):
    """``ok``, or why not."""

    status: str
    queue_length: int
    active_jobs: int
