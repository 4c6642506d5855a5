"""The progress bar of all commands: description, count, rate, time left."""

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
    """Units per second or hour."""

    def __init__(self, unit: str, time_unit: str) -> None:
        super().__init__()
        self.seconds_per_unit, self.unit = {"s": 1, "hour": 3600}[time_unit], f"{unit}/{time_unit}"

    def render(self, task: Task) -> Text:
        """Format the rate of a task."""
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
    """Iterate over items with a progress bar on stderr.

    Args:
        items: The items.
        description: The text before the bar.
        unit: The plural name of what is counted, e.g. ``LoRAs``.
        total: Number of units at the end; unknown if None.
        units_per_item: Units that each item counts for.
        time_unit: The unit of the rate, ``s`` or ``hour``.
        completed: Units that were done before.

    Yields:
        The items.
    """
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
