"""Types of the callbacks that cross the threads of an engine."""

from collections.abc import Callable

ProgressFn = Callable[[float], None]
"""Called from any thread with the fraction of the work that is done, 0 to 1."""
BatchCallback = Callable[[str, int], None]
"""Called from the model thread with the kind and the size of every batch, before it runs."""
