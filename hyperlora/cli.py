"""The verbs. Heavy libraries are imported inside each verb, so that ``--help`` is instant."""

import sys

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Console entry point."""
    if sys.argv[1:2] == ["train"]:  # LightningCLI parses its own arguments
        from hyperlora.training.cli import train

        train(sys.argv[2:])
        return
    app()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train() -> None:
    """Train a network: `hyperlora train fit --config configs/avatars/hypernetwork.yaml` (LightningCLI)."""
