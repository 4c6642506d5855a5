"""``--ray`` with an address, or alone."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

from hyperlora.errors import BadRequest

if TYPE_CHECKING:
    from PIL import Image
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


class RayCommand(TyperCommand):
    """A verb whose ``--ray`` may stand alone, for a cluster on this machine."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        if "--ray" in given:
            place = given.index("--ray") + 1
            if place == len(given) or given[place].startswith("-"):
                given.insert(place, "local")
        return super().parse_args(ctx, given)


def require_file(path: Path, suffix: str) -> None:
    """Raise ``BadRequest`` unless a file could be written at ``path``; creates nothing."""
    if path.suffix != suffix:
        raise BadRequest(f"{str(path)!r} cannot be written: a name that ends in {suffix} is expected")
    if path.is_dir():
        raise BadRequest(f"{str(path)!r} is a folder, a file was expected: name a file in it")
    require_folder(path.parent)


def require_folder(path: Path) -> None:
    """Raise ``BadRequest`` unless files could be written into the folder ``path``, made first where it is missing."""
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise BadRequest(f"cannot write into {str(path)!r}: {str(nearest)!r} is a file, a folder was expected")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise BadRequest(f"cannot write into {str(path)!r}: no permission in {str(nearest)!r}, choose another folder")


def write_picture(picture: "Image.Image", path: Path) -> None:
    """``path`` (PNG), whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    picture.save(part, "PNG")
    part.replace(path)


def weighted(text: str) -> tuple[Path, float]:
    """``FILE`` or ``FILE:WEIGHT``."""
    from hyperlora.errors import BadRequest

    path, _, weight = text.rpartition(":")
    if not path or Path(text).exists():
        return Path(text), 1.0
    try:
        number = float(weight)
    except ValueError:
        return Path(text), 1.0
    if not abs(number) <= 10:
        raise BadRequest(f"LoRA weight between -10 and 10 expected, got {weight!r} in {text!r}")
    return Path(path), number
