"""``main_callback train``."""

from typing import Any, Final

import typer

PASS_THROUGH: Final[dict[str, Any]] = {
    "allow_extra_args": True,
    "allow_interspersed_args": False,  # so that `train fit --help` is Lightning's own
    "ignore_unknown_options": True,
}


def train(context: typer.Context) -> None:
    """Train a network (LightningCLI): hyperlora train fit --config configs/avatars/image_to_lora.yaml

    All options are Lightning's: hyperlora train fit --help
    """
    from hyperlora.training.cli import train as lightning

    lightning(context.args)
