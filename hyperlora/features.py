"""``ImageFeatures``: the output of an image encoder for photos of subjects."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageFeatures:
    """Tokens of photos; the batch axis is subjects, views are several photos of one subject.

    Attributes:
        tokens: [batch, views, tokens, width].

    Raises:
        ValueError: The tensor has another number of axes.
    """

    tokens: Tensor

    def __post_init__(self) -> None:
        if self.tokens.ndim != 4:
            raise ValueError(
                f"[batch, views, tokens, width] expected, got {list(self.tokens.shape)}"
            )

    @property
    def width(self) -> int:
        """Numbers per token."""
        return self.tokens.shape[-1]

    def flatten_views(self) -> Tensor:
        """Concatenate the tokens of all views.

        Returns:
            [batch, views * tokens, width].
        """
        return self.tokens.flatten(1, 2)
