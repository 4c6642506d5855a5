"""/v1/identity-similarity: images against photos of the subject they should show."""

from typing import Annotated

from fastapi import APIRouter, File, Request, UploadFile
from starlette.exceptions import HTTPException

from hyperlora.service.api.forms import get_state
from hyperlora.service.api.responses import run_with_timeout
from hyperlora.service.api.schemas import SimilarityResponse
from hyperlora.service.engine.requests import SimilarityRequest
from hyperlora.service.errors import build_problem_responses
from hyperlora.service.security import Caller

router = APIRouter(prefix="/v1/identity-similarity", tags=["Identity similarity"])


@router.post("", responses=build_problem_responses(400, 403, 408, 413, 415, 503, 504))
async def compute_similarity(
    request: Request,
    owner: Caller,
    photos: Annotated[list[UploadFile], File(description="Photos of one subject.")],
    images: Annotated[list[UploadFile], File(description="Images that should show the subject.")],
) -> SimilarityResponse:
    """Compute the identity similarity of images to photos of one subject.

    An independent network computes it. The server needs an evaluator for images of its model
    (`supports_identity_similarity` in /v1/models).
    \f
    Args:
        request: The HTTP request.
        owner: Who asks.
        photos: Photos of one subject.
        images: Images to compare with them.

    Returns:
        One score per image, and their mean.
    """
    state = get_state(request)
    max_files, timeout_s = state.settings.max_photos, state.settings.timeout_s
    if (num_files := max(len(photos), len(images))) > max_files:
        raise HTTPException(
            413, f"{num_files} files sent, at most {max_files} photos and images each are taken"
        )
    similarity_request = SimilarityRequest(
        photos=[await photo.read() for photo in photos],
        images=[await image.read() for image in images],
    )
    result = await run_with_timeout(
        request, state.engine.run(similarity_request, timeout_s, owner=owner), timeout_s
    )
    similarities = result.value
    mean_similarity = sum(similarities) / len(similarities)
    return SimilarityResponse(mean_similarity=mean_similarity, similarities=similarities)
