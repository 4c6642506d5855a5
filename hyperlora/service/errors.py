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

from hyperlora.errors import BadImage, HyperloraError
from hyperlora.service.engine.batcher import Expired, QueueFull

MEDIA_TYPE: Final = "application/problem+json"
CLIENT_LEFT: Final = 499
"""In logs and metrics, as nginx counts them; nobody receives it."""
_UNSAID: Final = {
    "Not Found": "nothing is found at this path: /docs describes what is here",
    "Method Not Allowed": "this path does not take this method: /docs describes what it takes",
}
"""Sentences for what the router refuses by status alone."""
_log = logging.getLogger("hyperlora.service")


class Gone(Exception):
    """The caller left before the answer."""


class Problem(BaseModel):
    """What went wrong, for people (``detail``) and programs (``status``)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """A problem document as a response."""
    readable = detail.encode("utf-8", "replace").decode()  # it may quote half a surrogate pair out of a file
    body = Problem(title=HTTPStatus(status).phrase, status=status, detail=readable)
    return JSONResponse(body.model_dump(), status, headers, MEDIA_TYPE)


def documented(
    *statuses: int, also: Mapping[int | str, dict[str, Any]] | None = None
) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for the refusals of a route, beside those every route may give, and for what else it answers."""
    schema = {"$ref": "#/components/schemas/Problem"}
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in sorted({401, 422, 429, *statuses})
    }
    return {**(also or {}), **refusals}


def document_problems(app: FastAPI) -> None:
    """Let OpenAPI know the schema that ``documented`` refers to."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        schema = made()
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        schemas.setdefault("Problem", Problem.model_json_schema())
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def add_handlers(app: FastAPI) -> None:
    """Every exception becomes a problem document."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        detail = _UNSAID.get(str(error.detail), str(error.detail))
        return problem(error.status_code, detail, dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem(422, "; ".join(_said(item) for item in error.errors()[:3]))

    @app.exception_handler(HyperloraError)
    async def mendable(request: Request, error: HyperloraError) -> JSONResponse:
        return problem(415 if isinstance(error, BadImage) else 400, str(error))

    @app.exception_handler(QueueFull)
    async def busy(request: Request, error: QueueFull) -> JSONResponse:
        return problem(503, str(error), {"Retry-After": "5"})

    @app.exception_handler(Gone)
    async def left(request: Request, error: Gone) -> Response:
        return Response(status_code=CLIENT_LEFT)

    @app.exception_handler(Expired)
    async def late(request: Request, error: Expired) -> JSONResponse:
        return problem(504, str(error))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        _log.error("unexpected error", exc_info=error)
        return problem(500, "the server made a mistake; it is logged")


def _said(item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"] if part not in ("body", "query", "path", "header"))
    return f"{where or 'the request'}: {item['msg'][:1].lower()}{item['msg'][1:]}"
