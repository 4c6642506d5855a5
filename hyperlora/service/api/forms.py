"""Forms of the routes that take files, and the headers that they share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Depends, File, Form, Header, Request, UploadFile
from starlette.exceptions import HTTPException

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.formats import FormatChoice
from hyperlora.lora.io.keys import LoraFormat
from hyperlora.pipelines.config import GenerationConfig, LoraSampling, RefineMethod
from hyperlora.seeds import MAX_SEED
from hyperlora.service.api.schemas import FileId, Weight
from hyperlora.service.engine.requests import EditLoraRequest, LoraRequest, ModelInfo
from hyperlora.service.security import Caller
from hyperlora.service.state import AppState

Method = Literal["hypernetwork", "lora-diffusion"]
"""Methods of the models from photos."""


def get_state(request: Request) -> AppState:
    """Return the objects that the routes of the app share."""
    state: AppState = request.app.state.service
    return state


@dataclass(frozen=True)
class CallContext:
    """A request, its owner and its preferences.

    Attributes:
        request: The HTTP request.
        owner: Whose request it is.
        accept: The Accept header.
        prefer: The Prefer header.
    """

    request: Request
    owner: Caller
    accept: Annotated[
        str,
        Header(description="`application/json`: JSON instead of the file itself.", max_length=1000),
    ] = "*/*"
    prefer: Annotated[
        str,
        Header(
            description="`respond-async`: 202 and a job at once, instead of waiting.",
            max_length=200,
        ),
    ] = ""

    @property
    def state(self) -> AppState:
        """The objects that the routes of the app share."""
        return get_state(self.request)

    @property
    def wants_json(self) -> bool:
        """Whether the caller asks for JSON by name."""
        return "application/json" in self.accept.lower()

    @property
    def wants_job(self) -> bool:
        """Whether the caller prefers a job (respond-async of RFC 7240)."""
        return "respond-async" in self.prefer.lower()


Call = Annotated[CallContext, Depends()]
"""The context of a request, in a route's parameters."""


@dataclass(frozen=True)
class LoraForm:
    """The form of POST /v1/loras: photos, or pairs before and after an edit."""

    photos: Annotated[
        list[UploadFile] | None, File(description="PNG, JPEG or WEBP photos of one subject.")
    ] = None
    before: Annotated[list[UploadFile] | None, File(description="Or: images before an edit.")] = (
        None
    )
    after: Annotated[
        list[UploadFile] | None, File(description="The same images after it, in this order.")
    ] = None
    image: Annotated[
        UploadFile | None,
        File(description="The image to edit, for a model of pairs that makes its LoRA for one."),
    ] = None
    format: Annotated[
        FormatChoice, Form(description="Key names; auto is what most programs read of this base.")
    ] = "auto"
    rank: Annotated[int | None, Form(ge=1, le=128, description="The model's own if not given.")] = (
        None
    )
    strength: Annotated[Weight, Form()] = 1.0
    refine_steps: Annotated[
        int, Form(ge=0, le=500, description="Fine-tuning steps on the photos.")
    ] = 0
    refine_method: Annotated[
        RefineMethod | None,
        Form(
            description="The objective: the identity in generated images, or the photos' "
            "diffusion loss; the best the model can if not given."
        ),
    ] = None
    method: Annotated[
        Method | None, Form(description="Which model; the server's first if not given.")
    ] = None
    model: Annotated[
        str | None,
        Form(max_length=64, description="Its name in /v1/models instead, e.g. hyperlora-fidelity."),
    ] = None
    seed: Annotated[
        int, Form(ge=0, le=MAX_SEED, description="Another sample (lora-diffusion).")
    ] = 0
    title: Annotated[
        str, Form(max_length=100, description="Name of the file, also in its metadata.")
    ] = "LoRA"
    store: Annotated[bool, Form(description="Store the file on the server for a while.")] = False
    consent: Annotated[
        bool, Form(description="The subject agrees; recorded in the file's metadata.")
    ] = False

    async def read_request(self, max_photos: int) -> LoraRequest | EditLoraRequest:
        """Read the uploads into a request to the engine.

        Args:
            max_photos: Photos, or pairs, in one request.

        Returns:
            A ``LoraRequest`` of photos, or an ``EditLoraRequest`` of pairs.

        Raises:
            InvalidArgumentError: If the fields exclude each other.
            HTTPException: 413 for too many files.
        """
        photos = self.photos or []
        pairs = await read_pairs(self.before, self.after, max_photos)
        if len(photos) > max_photos:
            raise HTTPException(413, f"{len(photos)} photos sent, at most {max_photos} are taken")
        if bool(photos) == bool(pairs):
            raise InvalidArgumentError(
                "send photos of one subject, or before and after, and not both"
            )
        if pairs:
            self._check_pair_options()
            image = await self.image.read() if self.image else None
            return EditLoraRequest(
                pairs,
                self.strength,
                self.format,
                self.title,
                self.consent,
                self.model,
                image,
                self.rank,
            )
        if self.image is not None:
            raise InvalidArgumentError("image belongs to before and after: leave it out")
        config = GenerationConfig(
            format=self.format,
            rank=self.rank,
            strength=self.strength,
            refine_steps=self.refine_steps,
            sampling=LoraSampling(self.seed),
            refine_method=self.refine_method,
        )
        files = [await photo.read() for photo in photos]
        return LoraRequest(files, config, self.title, self.consent, self.method, self.model)

    def find_file_format(self, model_infos: Sequence[ModelInfo]) -> LoraFormat:
        """Find the format of the file of a pair, where the form leaves it open.

        Args:
            model_infos: The models of the server.

        Returns:
            The format of the file that the form asks for.
        """
        if self.format != "auto":
            return self.format
        for model_info in model_infos:
            if model_info.kind == "pair-to-lora" and model_info.lora_format:
                return model_info.lora_format
        return "diffusers"

    def _check_pair_options(self) -> None:
        is_refined = self.refine_steps or self.refine_method
        if is_refined or self.method or self.seed:
            raise InvalidArgumentError(
                "the LoRA of a pair is not refined and has no seed: "
                "leave refine_steps, refine_method, method and seed out"
            )


@dataclass(frozen=True)
class EditForm:
    """The form of POST /v1/edits: an image, and pairs, a LoRA or an instruction."""

    image: Annotated[UploadFile, File(description="The image to edit.")]
    before: Annotated[list[UploadFile] | None, File(description="Images before the edit.")] = None
    after: Annotated[list[UploadFile] | None, File(description="The same images after it.")] = None
    lora: Annotated[
        UploadFile | None, File(description="Or the LoRA of an edit, a .safetensors file.")
    ] = None
    lora_id: Annotated[FileId | None, Form(description="Or the id of a stored one.")] = None
    strength: Annotated[
        Weight, Form(description="Factor of the LoRA; of a pair, below 0 undoes the edit.")
    ] = 1.0
    instruction: Annotated[
        str, Form(max_length=1000, description="Edit prompt, besides the LoRA or instead.")
    ] = ""
    seed: Annotated[int, Form(ge=0, le=MAX_SEED)] = 0
    num_inference_steps: Annotated[
        int | None, Form(ge=1, le=50, description="The model's own if not given.")
    ] = None
    preserve_unedited: Annotated[
        bool, Form(description="Keep the pixels outside the edit as they are.")
    ] = True


async def read_pairs(
    before: list[UploadFile] | None, after: list[UploadFile] | None, max_pairs: int
) -> list[tuple[bytes, bytes]]:
    """Read the pairs of two lists of uploads.

    Args:
        before: Images before the edit.
        after: The same images after it.
        max_pairs: Pairs in one request.

    Returns:
        Image files before and after.

    Raises:
        InvalidArgumentError: If the lists are not equally long.
        HTTPException: 413 for too many pairs.
    """
    before, after = before or [], after or []
    if len(before) != len(after):
        raise InvalidArgumentError(
            f"{len(before)} images before and {len(after)} after sent: "
            "one after for each before expected"
        )
    if len(before) > max_pairs:
        raise HTTPException(413, f"{len(before)} pairs sent, at most {max_pairs} are taken")
    return [(await a.read(), await b.read()) for a, b in zip(before, after, strict=True)]
