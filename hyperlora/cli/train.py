"""``hyperlora train``."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import typer

from hyperlora.errors import ModelLoadError

PASS_THROUGH: Final[dict[str, bool]] = {
    "allow_extra_args": True,
    "allow_interspersed_args": False,  # so that `train fit --help` is Lightning's own
    "ignore_unknown_options": True,
}
"""Settings of a command whose arguments another parser reads."""
_MODEL_PREFIX: Final = "--model.init_args."


def train(context: typer.Context) -> None:
    """Train a network (LightningCLI): hyperlora train fit --config CONFIG.yaml

    What it would take in memory: hyperlora train estimate --config CONFIG.yaml

    All options are Lightning's: hyperlora train fit --help
    """
    if context.args[:1] == ["fit"]:
        _check_downloads(context.args)
    from hyperlora.training.cli import train as run_lightning

    run_lightning(context.args)


def _check_downloads(args: Sequence[str]) -> None:
    """Refuse a base or an encoder that is out of reach, before the heavy imports.

    Raises:
        ModelLoadError: It is neither cached nor can it be downloaded.
    """
    model = _read_model_arguments(args)
    repo_ids = {}
    if (base := model.get("base")) and not Path(base).exists():
        repo_ids[f"base {base!r}"] = base
    options = model.get("encoder_options")
    if isinstance(options, dict) and options.get("pretrained"):
        repo_ids[f"encoder {model['encoder']!r}"] = f"timm/{model['encoder']}"
    if not repo_ids:
        return
    from hyperlora.hub_connection import (
        format_offline_error,
        is_in_cache,
        require_cache_if_offline,
    )

    for noun, repo_id in repo_ids.items():
        if not is_in_cache(repo_id) and require_cache_if_offline():
            raise ModelLoadError(format_offline_error(noun))


def _read_model_arguments(args: Sequence[str]) -> dict[str, Any]:
    """Read ``model.init_args`` of the configurations, and what the command line says instead."""
    import yaml

    model: dict[str, Any] = {}
    pairs = [arg.split("=", 1) for arg in args if "=" in arg]
    pairs += [[name, value] for name, value in pairwise(args) if "=" not in name]
    for name, value in pairs:
        if name in ("--config", "-c") and Path(value).is_file():
            config = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            model |= ((config or {}).get("model") or {}).get("init_args") or {}
    for name, value in pairs:
        if name.startswith(_MODEL_PREFIX):
            model[name.removeprefix(_MODEL_PREFIX)] = yaml.safe_load(value)
    return model
