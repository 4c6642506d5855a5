"""Errors as RFC 9457 problem documents: every refusal is one sentence with a status."""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hyperlora.errors import HyperloraError, InvalidImageError, OutOfMemoryError
from hyperlora.service.engine.batcher import (
    DeadlineExceededError,
    OwnerQueueFullError,
    QueueFullError,
)
from hyperlora.service.file_store import StorageError

JsonObject = dict[str, Any]
"""A piece of an OpenAPI document."""
MEDIA_TYPE: Final = "application/problem+json"
CLIENT_CLOSED_REQUEST: Final = 499
"""Status in logs and metrics, as nginx counts it; nobody receives it."""
_COMMON_STATUSES: Final = (401, 422, 429)
_MAX_VALIDATION_ERRORS: Final = 3
_MAX_LOCATION_LENGTH: Final = 80
_ROUTER_MESSAGES: Final = {
    "Not Found": "nothing is found at this path: /docs describes what is here",
    "Method Not Allowed": "this path does not take this method: /docs describes what it takes",
}
"""Sentences for what the router refuses by status alone."""
_log = logging.getLogger("hyperlora.service")


class ClientDisconnectedError(Exception):
    """The caller left before the answer."""


class Problem(BaseModel):
    """What went wrong, for people (``detail``) and for programs (``status``)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str = Field(description="One sentence: what, expected, found, what to do.")


def make_problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Make a response that is a problem document.

    Args:
        status: HTTP status.
        detail: One sentence.
        headers: Further headers of the response.

    Returns:
        The response.
    """
    # a message may quote half a surrogate pair out of a file
    printable_detail = detail.encode("utf-8", "replace").decode()
    body = Problem(title=HTTPStatus(status).phrase, status=status, detail=printable_detail)
    return JSONResponse(body.model_dump(), status, headers, MEDIA_TYPE)


def build_problem_responses(
    *statuses: int, other_responses: Mapping[int | str, JsonObject] | None = None
) -> dict[int | str, JsonObject]:
    """Build the OpenAPI responses of a route.

    Args:
        statuses: Statuses of problems, besides 401, 422 and 429 that every route may answer.
        other_responses: Responses that are no problems.

    Returns:
        OpenAPI responses by status.
    """
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    problem_responses: dict[int | str, JsonObject] = {
        status: {"description": HTTPStatus(status).phrase, "content": content}
        for status in sorted({*_COMMON_STATUSES, *statuses})
    }
    return {**(other_responses or {}), **problem_responses}


def add_problem_schema(app: FastAPI) -> None:
    """Add the schema that ``build_problem_responses`` refers to, to the app's OpenAPI document."""
    default_openapi = app.openapi

    def build_openapi() -> JsonObject:
        schema = default_openapi()
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        schemas.setdefault("Problem", Problem.model_json_schema())
        return schema

    app.openapi = build_openapi  # type: ignore[method-assign]


def install_handlers(app: FastAPI) -> None:
    """Answer every exception of an app with a problem document."""

    @app.exception_handler(HTTPException)
    async def handle_http_error(request: Request, error: HTTPException) -> JSONResponse:
        detail = _ROUTER_MESSAGES.get(str(error.detail), str(error.detail))
        return make_problem(error.status_code, detail, dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(
        request: Request, error: RequestValidationError
    ) -> JSONResponse:
        messages = map(_format_validation_error, error.errors()[:_MAX_VALIDATION_ERRORS])
        return make_problem(422, "; ".join(messages))

    @app.exception_handler(HyperloraError)
    async def handle_hyperlora_error(request: Request, error: HyperloraError) -> JSONResponse:
        return make_problem(415 if isinstance(error, InvalidImageError) else 400, str(error))

    @app.exception_handler(OutOfMemoryError)
    async def handle_out_of_memory(request: Request, error: OutOfMemoryError) -> JSONResponse:
        return make_problem(503, str(error))

    @app.exception_handler(QueueFullError)
    async def handle_queue_full(request: Request, error: QueueFullError) -> JSONResponse:
        status = 429 if isinstance(error, OwnerQueueFullError) else 503
        return make_problem(status, str(error), {"Retry-After": "5"})

    @app.exception_handler(StorageError)
    async def handle_storage_error(request: Request, error: StorageError) -> JSONResponse:
        return make_problem(503, str(error), {"Retry-After": "60"})

    @app.exception_handler(ClientDisconnect)  # while the body is read
    @app.exception_handler(ClientDisconnectedError)
    async def handle_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(DeadlineExceededError)
    async def handle_deadline(request: Request, error: DeadlineExceededError) -> JSONResponse:
        return make_problem(504, str(error))

    @app.exception_handler(Exception)
    async def handle_unexpected_error(request: Request, error: Exception) -> JSONResponse:
        _log.error("unexpected error", exc_info=error)
        return make_problem(500, "the server made a mistake; it is logged")


def _format_validation_error(item: JsonObject) -> str:
    """Format one error of pydantic as ``field: message``."""
    sources = ("body", "query", "path", "header")
    # a part may be a key of the caller, of any length
    parts = [str(part)[:_MAX_LOCATION_LENGTH] for part in item["loc"] if part not in sources]
    location = ".".join(parts)
    return f"{location or 'the request'}: {item['msg'][:1].lower()}{item['msg'][1:]}"
