"""What several commands share: option parsing, checks of output paths, atomic image files."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from typer.core import TyperCommand

from hyperlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from PIL import Image

MAX_LORA_WEIGHT: Final = 10.0
"""The largest absolute weight of a LoRA file on the command line."""


class RayCommand(TyperCommand):
    """A command whose ``--ray`` takes an address, or stands alone for a cluster on this machine."""

    def parse_args(
        self,
        ctx: Any,  # noqa: ANN401 - typer keeps its Context private
        args: list[str],
    ) -> list[str]:
        """Give ``--ray`` the value ``local`` where it has none.

        Args:
            ctx: The context of the command line.
            args: The arguments as the user wrote them.

        Returns:
            The arguments that are left after parsing.
        """
        argv = list(args)
        if "--ray" in argv:
            value_index = argv.index("--ray") + 1
            if value_index == len(argv) or argv[value_index].startswith("-"):
                argv.insert(value_index, "local")
        return super().parse_args(ctx, argv)


def check_output_file(path: Path, suffix: str) -> None:
    """Check that a file can be written; nothing is created.

    Args:
        path: The file.
        suffix: The suffix that its name must have, e.g. ``.safetensors``.

    Raises:
        InvalidArgumentError: The suffix differs, the path is a folder, or its folder cannot be
            written.
    """
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
    """Check that files can be written into a folder, which may be missing; nothing is created.

    Args:
        path: The folder.

    Raises:
        InvalidArgumentError: The path is a file, or the nearest existing folder cannot be written.
    """
    existing_parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not existing_parent.is_dir():
        raise InvalidArgumentError(
            f"cannot write into {str(path)!r}: {str(existing_parent)!r} is a file, "
            "a folder was expected"
        )
    if not os.access(existing_parent, os.W_OK | os.X_OK):
        raise InvalidArgumentError(
            f"cannot write into {str(path)!r}: no permission in {str(existing_parent)!r}, "
            "choose another folder"
        )


def save_image(image: "Image.Image", path: Path) -> None:
    """Write a PNG file, whole or not at all, and its folder if it is missing.

    Args:
        image: The image.
        path: The file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temp_path = path.with_name(f".{path.name}.part")
    image.save(temp_path, "PNG")
    temp_path.replace(path)


def parse_weighted_path(text: str) -> tuple[Path, float]:
    """Parse ``FILE`` or ``FILE:WEIGHT``.

    Args:
        text: The argument; a file of the whole name counts as one without a weight.

    Returns:
        The path and the weight, 1 if there is none.

    Raises:
        InvalidArgumentError: The weight is not between -10 and 10.
    """
    path, _, weight = text.rpartition(":")
    if not path or Path(text).exists():
        return Path(text), 1.0
    try:
        weight_value = float(weight)
    except ValueError:
        return Path(text), 1.0
    if not abs(weight_value) <= MAX_LORA_WEIGHT:  # also refuses NaN
        raise InvalidArgumentError(
            f"LoRA weight between -10 and 10 expected, got {weight!r} in {text!r}"
        )
    return Path(path), weight_value
