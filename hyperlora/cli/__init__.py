"""The commands. Heavy libraries are imported inside each command, so that ``--help`` is instant."""

from typing import Any

import typer
from typer.core import TyperGroup

from hyperlora.cli import demo, edit, evaluate, generate, inspect, lora_tools, render, serve, train
from hyperlora.cli.options import RayCommand
from hyperlora.errors import HyperloraError


class CommandGroup(TyperGroup):
    """Commands whose errors are one sentence on stderr.

    A ``HyperloraError`` exits with code 2, an error of the operating system (disk full, no
    permission) with code 1. Anything else is a bug and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> object:  # noqa: ANN401 - typer keeps its Context private
        """Run a command and turn its errors into sentences and exit codes.

        Args:
            ctx: The context of the command line.

        Returns:
            What the command returns.

        Raises:
            typer.Exit: The command failed with an error that the user can solve.
        """
        try:
            return super().invoke(ctx)
        except HyperloraError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
        except BrokenPipeError:  # `hyperlora … | head`: typer ends quietly
            raise
        except OSError as error:
            location = f"{error.filename}: " if error.filename else ""
            typer.echo(f"error: {location}{error.strerror or error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
app.command("demo")(demo.run_demo)
app.command(cls=RayCommand)(generate.generate)
app.command(cls=edit.EditCommand)(edit.edit)
app.command()(render.render)
app.command()(inspect.inspect)
app.command()(evaluate.evaluate)
app.command()(serve.serve)
for command in (
    lora_tools.convert,
    lora_tools.combine,
    lora_tools.diff,
    lora_tools.resize,
    lora_tools.scale,
    lora_tools.split,
):
    app.command()(command)
app.command(context_settings=train.PASS_THROUGH)(train.train)


@app.callback()
def show_help() -> None:
    """Generate LoRAs from photos or before/after pairs in one forward pass."""


def main() -> None:
    """Run the command line; the console entry point."""
    app()
