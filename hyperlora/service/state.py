from dataclasses import dataclass

from hyperlora.service.engine.base import Engine
from hyperlora.service.file_store import Files
from hyperlora.service.jobs import Jobs
from hyperlora.service.metrics import Metrics
from hyperlora.service.settings import ServiceSettings


@dataclass
class Service:
    """What the routes of one app share."""

    settings: ServiceSettings
    files: Files
    engine: Engine
    jobs: Jobs
    metrics: Metrics
