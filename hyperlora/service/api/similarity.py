"""/v1/likeness: pictures and the person they should show."""

from typing import Annotated

from fastapi import APIRouter, File, Request, UploadFile
from starlette.exceptions import HTTPException

from hyperlora.service.api.responses import in_time, service_of
from hyperlora.service.api.schemas import Likeness
from hyperlora.service.engine.requests import LikenessOrder
from hyperlora.service.errors import documented
from hyperlora.service.security import Caller

router = APIRouter(prefix="/v1/likeness", tags=["Likeness"])


@router.post("", responses=documented(400, 403, 408, 413, 415, 503, 504))
async def compare(
    request: Request,
    owner: Caller,
    photos: Annotated[list[UploadFile], File(description="Photos of one person.")],
    pictures: Annotated[list[UploadFile], File(description="Pictures that should show this person.")],
) -> Likeness:
    """How much pictures show the person of the photos, read by a network that took no part in drawing them. Needs an
    evaluator for the kind of pictures that the model draws (`likeness` in /v1/models)."""
    service = service_of(request)
    if (most := max(len(photos), len(pictures))) > service.settings.max_photos:
        raise HTTPException(413, f"{most} pictures sent, at most {service.settings.max_photos} of each kind are taken")
    order = LikenessOrder([await p.read() for p in photos], [await p.read() for p in pictures])
    seconds = service.settings.deadline
    found = await in_time(request, service.engine.likeness(order, seconds), seconds)
    return Likeness(likeness=sum(found) / len(found), pictures=found)
