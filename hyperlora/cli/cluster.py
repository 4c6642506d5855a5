"""``--ray`` with an address, or alone."""

from typing import Any

from typer.core import TyperCommand


class RayCommand(TyperCommand):
    """A verb whose ``--ray`` may stand alone, for a cluster on this machine."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        if "--ray" in given:
            place = given.index("--ray") + 1
            if place == len(given) or given[place].startswith("-"):
                given.insert(place, "local")
        return super().parse_args(ctx, given)
