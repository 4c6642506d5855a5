"""Errors that a user can cause and repair; the CLI exits with status 2 on any of them.

Each message is one sentence: what failed, what was expected, what was found, what to do.
"""


class HyperloraError(Exception):
    """Base class of all errors of this package."""


class LayoutMismatchError(HyperloraError):
    """LoRA weights do not fit a base model or other LoRA weights."""


class InvalidImageError(HyperloraError):
    """An image cannot or must not be read."""


class InvalidLoraFileError(HyperloraError):
    """A LoRA file cannot be trusted or understood."""


class ModelLoadError(HyperloraError):
    """A folder or hub id does not hold the expected model."""


class InvalidArgumentError(HyperloraError):
    """Arguments are out of range or contradict each other."""


class OutOfMemoryError(HyperloraError):
    """The memory of the device is used up."""


def format_reason(error: BaseException, max_length: int = 200) -> str:
    """Format an error of another library for use inside a sentence.

    Args:
        error: Any exception.
        max_length: Characters after which the text is cut.

    Returns:
        The text of the error on one line.
    """
    return " ".join(str(error).split())[:max_length]
