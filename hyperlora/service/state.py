"""``AppState``: the objects that the routes of one app share."""

from dataclasses import dataclass

from hyperlora.service.engine.base import Engine
from hyperlora.service.file_store import FileStore
from hyperlora.service.jobs import Jobs
from hyperlora.service.metrics import Metrics
from hyperlora.service.settings import ServiceSettings
from hyperlora.service.shutdown import Shutdown


@dataclass
class AppState:
    """The objects that the routes of one app share.

    Attributes:
        settings: What the operator decides.
        files: Files that callers asked to store.
        engine: The models.
        jobs: Accepted jobs.
        metrics: Prometheus metrics.
        shutdown: Ends the work when the server stops.
    """

    settings: ServiceSettings
    files: FileStore
    engine: Engine
    jobs: Jobs
    metrics: Metrics
    shutdown: Shutdown
