from dataclasses import dataclass

from hyperlora.service.engine.base import Engine
from hyperlora.service.file_store import FileStore
from hyperlora.service.jobs import Jobs
from hyperlora.service.metrics import Metrics
from hyperlora.service.settings import ServiceSettings


@dataclass
class AppState:
    """What the routes of one app share."""

    settings: ServiceSettings
    files: FileStore
    engine: Engine
    jobs: Jobs
    metrics: Metrics
