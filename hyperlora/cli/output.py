"""Where a verb may write, asked before anything slow begins; and writing pictures."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from hyperlora.errors import BadRequest

if TYPE_CHECKING:
    from PIL import Image


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
