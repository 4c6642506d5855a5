"""The verbs. Heavy libraries are imported inside each verb, so that ``--help`` is instant."""

from typing import Any

import typer
from typer.core import TyperGroup

from hyperlora.cli import demo, edit, evaluate, generate, inspect, lora_tools, render, serve, train
from hyperlora.cli.options import RayCommand
from hyperlora.errors import HyperloraError


class CommandGroup(TyperGroup):
    """What a user can mend is one sentence on stderr and exit code 2. What the machine refuses half-way (disk full,
    permissions lost) is one sentence and exit code 1; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
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
app.command()(demo.run_demo)
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
def main_callback() -> None:
    """A photo goes in, a LoRA comes out in one forward pass."""


def main() -> None:
    """Console entry point."""
    app()
