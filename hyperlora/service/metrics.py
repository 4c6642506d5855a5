"""Prometheus metrics, and one structured log line per request, without content of callers."""

import json
import logging
import time
from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hyperlora.service.errors import CLIENT_CLOSED_REQUEST

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_log = logging.getLogger("hyperlora.service")


class Metrics:
    """Counters, histograms and gauges of one app, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "hyperlora_requests", "Requests", ["method", "route", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "hyperlora_request_seconds", "Time of requests", ["route"], registry=self.registry
        )
        self.batch_sizes = Histogram(
            "hyperlora_batch_size",
            "Requests in one batch",
            ["work"],
            buckets=(1, 2, 4, 8, 16, 32),
            registry=self.registry,
        )
        self.jobs = Counter(
            "hyperlora_jobs", "State changes of jobs", ["kind", "state"], registry=self.registry
        )
        self.sweep_errors = Counter(
            "hyperlora_sweep_errors",
            "Deletions of what is out of date that failed",
            registry=self.registry,
        )
        self.queue_length = Gauge(
            "hyperlora_queue_length", "Requests waiting for the model", registry=self.registry
        )
        self.active_jobs = Gauge(
            "hyperlora_active_jobs", "Jobs not yet finished", registry=self.registry
        )

    def observe_batch(self, kind: str, size: int) -> None:
        """Record one batch.

        Args:
            kind: Kind of the work.
            size: Number of requests in the batch.
        """
        self.batch_sizes.labels(kind).observe(size)

    def count_job_state(self, kind: str, state: str) -> None:
        """Count one job that enters a state.

        Args:
            kind: Kind of the job.
            state: The state that it enters.
        """
        self.jobs.labels(kind, state).inc()

    def connect_gauges(
        self, get_queue_length: Callable[[], float], get_active_jobs: Callable[[], float]
    ) -> None:
        """Let the gauges read their values when they are scraped.

        Args:
            get_queue_length: Returns the number of requests that wait for the model.
            get_active_jobs: Returns the number of jobs that are not finished.
        """
        self.queue_length.set_function(get_queue_length)
        self.active_jobs.set_function(get_active_jobs)

    def render_text(self) -> bytes:
        """Render all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)


class MetricsMiddleware:
    """ASGI middleware that counts and logs every request by its route, not by its path.

    Args:
        app: The application.
        metrics: Where requests are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application and record the status and the time of the response."""
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
            self._record(scope, status, time.perf_counter() - start_time)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        # a caller may invent methods, and each would become a time series
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        self.metrics.requests.labels(method, route, status).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        owner = scope.get("state", {}).get("owner", "")
        fields = {"method": method, "route": route, "status": status, "seconds": round(seconds, 4)}
        _log.info(json.dumps(fields | ({"key": owner} if owner else {})))


class JsonLogFormatter(logging.Formatter):
    """Log records as JSON objects."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; a message that is a JSON object is merged into it."""
        text = record.getMessage()
        fields: dict[str, object] = json.loads(text) if text.startswith("{") else {"message": text}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(
            {"time": self.formatTime(record), "level": record.levelname.lower(), **fields}
        )


def configure_logging() -> None:
    """Log one JSON object per line to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLogFormatter())
    for name in ("hyperlora.service", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
