"""``ImageFeatures``: what an encoder says about the photos of each subject."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageFeatures:
    """``tokens`` [batch, views, tokens, width]; views are several photos of one subject, batch is subjects."""

    tokens: Tensor

    def __post_init__(self) -> None:
        if self.tokens.ndim != 4:
            raise ValueError(
                f"[batch, views, tokens, width] expected, got {list(self.tokens.shape)}"
            )

    @property
    def width(self) -> int:
        return self.tokens.shape[-1]

    def flatten_views(self) -> Tensor:
        """All views' tokens in one sequence, [batch, views * tokens, width]."""
        return self.tokens.flatten(1, 2)
