"""What can go wrong, each in one sentence: what, expected, found, what to do. The CLI exits 2 on any of these."""


class HyperloraError(Exception):
    """Base of every error that a user can cause and mend."""


class LayoutMismatchError(HyperloraError):
    """LoRA weights and a base model (or another LoRA) do not belong together."""


class InvalidImageError(HyperloraError):
    """A picture that cannot or must not be read."""


class InvalidLoraFileError(HyperloraError):
    """A LoRA file that cannot be trusted or understood."""


class ModelLoadError(HyperloraError):
    """A folder or hub id that does not hold what was expected."""


class InvalidArgumentError(HyperloraError):
    """Arguments that make no sense together."""


def format_reason(error: BaseException, max_length: int = 200) -> str:
    """Format an error of another library for use inside a sentence.

    Args:
        error: Any exception.
        max_length: Characters after which the text is cut.

    Returns:
        The text of the error on one line.
    """
    return " ".join(str(error).split())[:max_length]
