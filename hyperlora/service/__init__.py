"""LoRAs from images over HTTP: one FastAPI app (the contract) over an engine (the work).

request ── security, limits ──▶ route ── Engine ──▶ LoRA bytes or PNG ── sync, or a job ──▶ response
"""

from hyperlora.service.app import create_app
from hyperlora.service.engine import Engine, LocalEngine
from hyperlora.service.settings import ServiceSettings

__all__ = ["Engine", "LocalEngine", "ServiceSettings", "create_app"]
