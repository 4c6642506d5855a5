"""``hyperlora train``."""

from typing import Final

import typer

PASS_THROUGH: Final[dict[str, bool]] = {
    "allow_extra_args": True,
    "allow_interspersed_args": False,  # so that `train fit --help` is Lightning's own
    "ignore_unknown_options": True,
}
"""Settings of a command whose arguments another parser reads."""


def train(context: typer.Context) -> None:
    """Train a network (LightningCLI): hyperlora train fit --config CONFIG.yaml

    All options are Lightning's: hyperlora train fit --help
    """
    from hyperlora.training.cli import train as run_lightning

    run_lightning(context.args)
