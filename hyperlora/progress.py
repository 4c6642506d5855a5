"""The one progress bar: what, how many, at what rate, time left."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str, time_unit: str) -> None:
        super().__init__()
        self.seconds_per_unit, self.unit = {"s": 1, "hour": 3600}[time_unit], f"{unit}/{time_unit}"

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(
            f"{speed * self.seconds_per_unit:.1f} {self.unit}" if speed else f"– {self.unit}"
        )


def track(
    items: Iterable[T],
    description: str,
    unit: str,
    total: int | None = None,
    units_per_item: int = 1,
    time_unit: str = "s",
    completed: int = 0,
) -> Iterator[T]:
    """Iterate with a bar on stderr; each item counts for ``units_per_item`` units of ``total``, of which ``completed`` were there
    before. The rate is ``time_unit`` s or hour."""
    rate = _RateColumn(unit, time_unit)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        rate,
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total, completed=completed)
        for item in items:
            yield item
            bar.advance(task, units_per_item)
