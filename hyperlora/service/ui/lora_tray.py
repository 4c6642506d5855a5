"""The LoRAs of one visitor's window, made here or added as files, for the compose tab."""

from dataclasses import dataclass
from typing import Final

import gradio as gr

MAX_ITEMS: Final = 6
"""LoRAs that the tray holds."""


@dataclass(frozen=True)
class TrayItem:
    """A LoRA file and its name in the tray.

    Attributes:
        name: The name.
        data: The ``.safetensors`` file.
        negative: The file for the negative branch of guidance; None for a model without one.
    """

    name: str
    data: bytes
    negative: bytes | None = None


def make_tray_state(retention_s: int) -> gr.State:
    """Make an empty tray on the server, deleted ``retention_s`` seconds after its last change."""
    return gr.State([], time_to_live=retention_s)


def add_item(
    items: list[TrayItem], name: str, data: bytes, negative: bytes | None = None
) -> list[TrayItem]:
    """Add a LoRA to a tray.

    Args:
        items: The tray.
        name: Name of the LoRA; a number is added if another LoRA has it.
        data: The ``.safetensors`` file; it replaces an item of the same content.
        negative: The file for the negative branch of guidance; None for none.

    Returns:
        The last ``MAX_ITEMS`` items.
    """
    other_items = [item for item in items if item.data != data]
    used_names = {item.name for item in other_items}
    names = [name, *(f"{name} {i}" for i in range(2, MAX_ITEMS + 2))]
    free_name = next(candidate for candidate in names if candidate not in used_names)
    return [*other_items, TrayItem(free_name, data, negative)][-MAX_ITEMS:]
