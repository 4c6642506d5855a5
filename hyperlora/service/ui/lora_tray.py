"""The LoRAs of one visitor's window, made here or added as files, for the compose tab."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import gradio as gr

MAX_ITEMS: Final = 6
"""LoRAs that the tray holds."""


@dataclass(frozen=True)
class TrayItem:
    """A LoRA and its name in the tray. The file is in the folder of uploads.

    Attributes:
        name: The name.
        path: The ``.safetensors`` file.
        negative_path: That for the negative branch of guidance; None for a model without one.
    """

    name: str
    path: str
    negative_path: str | None = None


def make_tray_state(retention_s: int) -> gr.State:
    """Make an empty tray on the server, deleted ``retention_s`` seconds after its last change."""
    return gr.State([], time_to_live=retention_s)


def add_item(
    items: Sequence[TrayItem], name: str, path: str, negative_path: str | None = None
) -> list[TrayItem]:
    """Add a LoRA to a tray.

    Args:
        items: The tray.
        name: Name of the LoRA; a number is added if another LoRA has it.
        path: The ``.safetensors`` file; its item is replaced if it is there already.
        negative_path: That for the negative branch of guidance; None for none.

    Returns:
        The last ``MAX_ITEMS`` items.
    """
    other_items = [item for item in items if item.path != path]
    used_names = {item.name for item in other_items}
    names = [name, *(f"{name} {i}" for i in range(2, MAX_ITEMS + 2))]
    free_name = next(candidate for candidate in names if candidate not in used_names)
    return [*other_items, TrayItem(free_name, path, negative_path)][-MAX_ITEMS:]
