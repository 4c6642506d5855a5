"""The one progress bar: what, how many, at what rate, time left."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")


class _Rate(ProgressColumn):
    def __init__(self, unit: str, per: str) -> None:
        super().__init__()
        self.seconds, self.unit = {"s": 1, "hour": 3600}[per], f"{unit}/{per}"

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed * self.seconds:.1f} {self.unit}" if speed else f"– {self.unit}")


def track(
    items: Iterable[T], label: str, unit: str, total: int | None = None, size: int = 1, per: str = "s", done: int = 0
) -> Iterator[T]:
    """Iterate with a bar on stderr; each item counts for ``size`` units of ``total``, of which ``done`` were there
    before. The rate is ``per`` s or hour."""
    rate = _Rate(unit, per)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, completed=done)
        for item in items:
            yield item
            bar.advance(task, size)
