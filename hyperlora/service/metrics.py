"""Prometheus metrics and one structured log line per request, without a word of anyone's content."""

import json
import logging
import time
from collections.abc import Callable
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hyperlora.service.errors import CLIENT_CLOSED_REQUEST

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_log = logging.getLogger("hyperlora.service")


class Metrics:
    """Counters of one app, in a registry of its own."""

    def __init__(
        self, get_queue_length: Callable[[], float], get_active_jobs: Callable[[], float]
    ) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "hyperlora_requests", "Requests", ["method", "route", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "hyperlora_request_seconds", "Time of requests", ["route"], registry=self.registry
        )
        self.batch_sizes = Histogram(
            "hyperlora_batch_size",
            "Requests done together",
            ["work"],
            buckets=(1, 2, 4, 8, 16, 32),
            registry=self.registry,
        )
        self.jobs = Counter(
            "hyperlora_jobs", "Changes of jobs", ["kind", "state"], registry=self.registry
        )
        Gauge(
            "hyperlora_queue", "Requests waiting for the model", registry=self.registry
        ).set_function(get_queue_length)
        Gauge("hyperlora_open_jobs", "Jobs not yet finished", registry=self.registry).set_function(
            get_active_jobs
        )

    def render_text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class MetricsMiddleware:
    """ASGI middleware: counts and logs every request by its route, not its path."""

    def __init__(self, app: ASGIApp, get_metrics: Callable[[], Metrics]) -> None:
        self.app, self.get_metrics = app, get_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start_time, status = time.perf_counter(), CLIENT_CLOSED_REQUEST

        async def send_and_record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_record)
        except Exception:
            status = 500
            raise
        finally:
            seconds = time.perf_counter() - start_time
            route = getattr(scope.get("route"), "path", "unmatched")
            metrics = self.get_metrics()
            method = (
                scope["method"] if scope["method"] in _METHODS else "OTHER"
            )  # a caller may invent one each time
            metrics.requests.labels(method, route, status).inc()
            metrics.request_seconds.labels(route).observe(seconds)
            owner = scope.get("state", {}).get("owner", "")
            fields = {
                "method": method,
                "route": route,
                "status": status,
                "seconds": round(seconds, 4),
            }
            _log.info(json.dumps(fields | ({"key": owner} if owner else {})))


class JsonLogFormatter(logging.Formatter):
    """Log records as JSON objects."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        fields: dict[str, Any] = json.loads(text) if text.startswith("{") else {"message": text}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(
            {"time": self.formatTime(record), "level": record.levelname.lower(), **fields}
        )


def configure_logging() -> None:
    """One JSON object a line, on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLogFormatter())
    for name in ("hyperlora.service", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
