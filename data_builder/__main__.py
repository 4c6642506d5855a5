"""``python -m data_builder``: build the datasets that training reads."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Build the datasets that training reads."""


@app.command()
def avatars(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    people: Annotated[int, typer.Option(min=1, help="How many people.")] = 6000,
    each: Annotated[int, typer.Option(min=1, help="Portraits of each person.")] = 4,
    size: Annotated[int, typer.Option(min=16, help="Pixels.")] = 128,
) -> None:
    """Draw portraits of avatars: PEOPLE persons, EACH portraits of every one."""
    from data_builder.avatars.portraits import Plan, draw_portraits

    draw_portraits(out, Plan(split=split, people=people, each=each, size=size))


if __name__ == "__main__":
    app()
