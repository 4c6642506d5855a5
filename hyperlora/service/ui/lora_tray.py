"""The LoRAs of one visitor's window: made here or added as files, for composing."""

from dataclasses import dataclass
from typing import Final

import gradio as gr

MAX_ITEMS: Final = 6


@dataclass(frozen=True)
class TrayItem:
    """A LoRA file and what it is called."""

    name: str
    data: bytes


def make_tray_state(retention_s: int) -> gr.State:
    """Empty at first; lives on the server and is forgotten ``retention_s`` after its last change."""
    return gr.State([], time_to_live=retention_s)


def add_item(items: list[TrayItem], name: str, data: bytes) -> list[TrayItem]:
    """The last ``MAX_ITEMS``, each under a name of its own; one of the same content is not added twice."""
    others = [item for item in items if item.data != data]
    names = {item.name for item in others}
    free_name = next(
        n for n in (name, *(f"{name} {i}" for i in range(2, MAX_ITEMS + 2))) if n not in names
    )
    return [*others, TrayItem(free_name, data)][-MAX_ITEMS:]
