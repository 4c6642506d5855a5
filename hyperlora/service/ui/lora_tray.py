"""The LoRAs of one visitor's window: made here or added as files, for composing."""

from dataclasses import dataclass
from typing import Final

import gradio as gr

MOST: Final = 6


@dataclass(frozen=True)
class Kept:
    """A LoRA file and what it is called."""

    name: str
    data: bytes


def shelf_state(seconds: int) -> gr.State:
    """Empty at first; lives on the server and is forgotten ``seconds`` after its last change."""
    return gr.State([], time_to_live=seconds)


def with_one_more(shelf: list[Kept], name: str, data: bytes) -> list[Kept]:
    """The last ``MOST``, each under a name of its own; one of the same content is not added twice."""
    others = [kept for kept in shelf if kept.data != data]
    names = {kept.name for kept in others}
    free = next(n for n in (name, *(f"{name} {i}" for i in range(2, MOST + 2))) if n not in names)
    return [*others, Kept(free, data)][-MOST:]
