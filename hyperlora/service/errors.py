"""Errors as RFC 9457 problem documents: every refusal is one sentence with a status."""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from hyperlora.errors import HyperloraError, InvalidImageError
from hyperlora.service.engine.batcher import DeadlineExceededError, QueueFullError

MEDIA_TYPE: Final = "application/problem+json"
CLIENT_CLOSED_REQUEST: Final = 499
"""In logs and metrics, as nginx counts them; nobody receives it."""
_ROUTER_MESSAGES: Final = {
    "Not Found": "nothing is found at this path: /docs describes what is here",
    "Method Not Allowed": "this path does not take this method: /docs describes what it takes",
}
"""Sentences for what the router refuses by status alone."""
_log = logging.getLogger("hyperlora.service")


class ClientDisconnectedError(Exception):
    """The caller left before the answer."""


class Problem(BaseModel):
    """What went wrong, for people (``detail``) and programs (``show_status``)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


def make_problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """A problem document as a response."""
    printable_detail = detail.encode(
        "utf-8", "replace"
    ).decode()  # it may quote half a surrogate pair out of a file
    body = Problem(title=HTTPStatus(status).phrase, status=status, detail=printable_detail)
    return JSONResponse(body.model_dump(), status, headers, MEDIA_TYPE)


def build_problem_responses(
    *statuses: int, other_responses: Mapping[int | str, dict[str, Any]] | None = None
) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for the refusals of a route, beside those every route may give, and for what else it answers."""
    schema = {"$ref": "#/components/schemas/Problem"}
    problem_responses: dict[int | str, dict[str, Any]] = {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: {"schema": schema}},
        }
        for status in sorted({401, 422, 429, *statuses})
    }
    return {**(other_responses or {}), **problem_responses}


def add_problem_schema(app: FastAPI) -> None:
    """Let OpenAPI know the schema that ``build_problem_responses`` refers to."""
    default_openapi = app.openapi

    def build_openapi() -> dict[str, Any]:
        schema = default_openapi()
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        schemas.setdefault("Problem", Problem.model_json_schema())
        return schema

    app.openapi = build_openapi  # type: ignore[method-assign]


def install_handlers(app: FastAPI) -> None:
    """Every exception becomes a problem document."""

    @app.exception_handler(HTTPException)
    async def handle_http_error(request: Request, error: HTTPException) -> JSONResponse:
        detail = _ROUTER_MESSAGES.get(str(error.detail), str(error.detail))
        return make_problem(error.status_code, detail, dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(
        request: Request, error: RequestValidationError
    ) -> JSONResponse:
        return make_problem(
            422, "; ".join(_format_validation_error(item) for item in error.errors()[:3])
        )

    @app.exception_handler(HyperloraError)
    async def handle_hyperlora_error(request: Request, error: HyperloraError) -> JSONResponse:
        return make_problem(415 if isinstance(error, InvalidImageError) else 400, str(error))

    @app.exception_handler(QueueFullError)
    async def handle_queue_full(request: Request, error: QueueFullError) -> JSONResponse:
        return make_problem(503, str(error), {"Retry-After": "5"})

    @app.exception_handler(ClientDisconnectedError)
    async def handle_disconnect(request: Request, error: ClientDisconnectedError) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(DeadlineExceededError)
    async def handle_deadline(request: Request, error: DeadlineExceededError) -> JSONResponse:
        return make_problem(504, str(error))

    @app.exception_handler(Exception)
    async def handle_unexpected_error(request: Request, error: Exception) -> JSONResponse:
        _log.error("unexpected error", exc_info=error)
        return make_problem(500, "the server made a mistake; it is logged")


def _format_validation_error(item: dict[str, Any]) -> str:
    location = ".".join(
        str(part) for part in item["loc"] if part not in ("body", "query", "path", "header")
    )
    return f"{location or 'the request'}: {item['msg'][:1].lower()}{item['msg'][1:]}"
