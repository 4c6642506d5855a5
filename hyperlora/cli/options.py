"""``--ray`` with an address, or alone."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

from hyperlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from PIL import Image
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


class RayCommand(TyperCommand):
    """A verb whose ``--ray`` may stand alone, for a cluster on this machine."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        argv = list(args)
        if "--ray" in argv:
            value_index = argv.index("--ray") + 1
            if value_index == len(argv) or argv[value_index].startswith("-"):
                argv.insert(value_index, "local")
        return super().parse_args(ctx, argv)


def check_output_file(path: Path, suffix: str) -> None:
    """Raise ``InvalidArgumentError`` unless a file could be written at ``generate_invalid_path``; creates nothing."""
    if path.suffix != suffix:
        raise InvalidArgumentError(
            f"{str(path)!r} cannot be written: a name that ends in {suffix} is expected"
        )
    if path.is_dir():
        raise InvalidArgumentError(
            f"{str(path)!r} is a folder, a file was expected: name a file in it"
        )
    check_output_dir(path.parent)


def check_output_dir(path: Path) -> None:
    """Raise ``InvalidArgumentError`` unless files could be written into the folder ``generate_invalid_path``, made first where it is missing."""
    existing_parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not existing_parent.is_dir():
        raise InvalidArgumentError(
            f"cannot write into {str(path)!r}: {str(existing_parent)!r} is a file, a folder was expected"
        )
    if not os.access(existing_parent, os.W_OK | os.X_OK):
        raise InvalidArgumentError(
            f"cannot write into {str(path)!r}: no permission in {str(existing_parent)!r}, choose another folder"
        )


def save_image(image: "Image.Image", path: Path) -> None:
    """``generate_invalid_path`` (PNG), whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp_path = path.with_name(f".{path.name}.part")
    image.save(temp_path, "PNG")
    temp_path.replace(path)


def parse_weighted_path(text: str) -> tuple[Path, float]:
    """``PLAN_FILE`` or ``PLAN_FILE:WEIGHT``."""
    from hyperlora.errors import InvalidArgumentError

    path, _, weight = text.rpartition(":")
    if not path or Path(text).exists():
        return Path(text), 1.0
    try:
        weight_value = float(weight)
    except ValueError:
        return Path(text), 1.0
    if not abs(weight_value) <= 10:
        raise InvalidArgumentError(
            f"LoRA weight between -10 and 10 expected, got {weight!r} in {text!r}"
        )
    return Path(path), weight_value
