"""/v1/likeness: pictures and the person they should show."""

from typing import Annotated

from fastapi import APIRouter, File, Request, UploadFile
from starlette.exceptions import HTTPException

from hyperlora.service.api.responses import get_state, run_with_timeout
from hyperlora.service.api.schemas import SimilarityResponse
from hyperlora.service.engine.requests import SimilarityRequest
from hyperlora.service.errors import build_problem_responses
from hyperlora.service.security import Caller

router = APIRouter(prefix="/v1/likeness", tags=["Likeness"])


@router.post("", responses=build_problem_responses(400, 403, 408, 413, 415, 503, 504))
async def compute_similarity(
    request: Request,
    owner: Caller,
    photos: Annotated[list[UploadFile], File(description="Photos of one person.")],
    images: Annotated[list[UploadFile], File(description="Pictures that should show this person.")],
) -> SimilarityResponse:
    """How much pictures show the person of the photos, read by a network that took no part in drawing them. Needs an
    evaluator for the kind of pictures that the model draws (`likeness` in /v1/models)."""
    state = get_state(request)
    if (num_files := max(len(photos), len(images))) > state.settings.max_photos:
        raise HTTPException(
            413,
            f"{num_files} pictures sent, at most {state.settings.max_photos} of each kind are taken",
        )
    similarity_request = SimilarityRequest(
        [await p.read() for p in photos], [await p.read() for p in images]
    )
    timeout_s = state.settings.timeout_s
    similarities = await run_with_timeout(
        request, state.engine.compute_similarity(similarity_request, timeout_s), timeout_s
    )
    return SimilarityResponse(
        mean_similarity=sum(similarities) / len(similarities), similarities=similarities
    )
