"""Settings of fine-tuning and of refinement, checked when they are made."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from math import cos, isfinite, pi
from typing import Final, Literal, get_args

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.layout import LoraLayout
from hyperlora.progress import track
from hyperlora.seeds import validate_seed

LrScheduler = Literal["constant", "linear", "cosine"]
LR_SCHEDULERS: Final = get_args(LrScheduler)


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """Settings of ``fine_tune_loras``.

    Attributes:
        num_steps: Optimizer steps, 0 or more.
        lr: Peak learning rate of Adam.
        lr_scheduler: ``constant``, ``linear`` or ``cosine``: how it falls, in the end to 0.
        lr_warmup_steps: Steps over which it rises from 0.
        batch_size: Random examples of each subject per step.
        prior_loss_weight: Weight of the prior-preservation loss (DreamBooth, 2208.12242, eq. 2).
        snapshot_steps: Steps after which a copy of the LoRAs is kept in the result.
        num_paired_groups: With t > 1 the K subjects form t groups of K/t. Subjects i, i + K/t,
            i + 2K/t, ... see the same examples, timesteps and noise. Not together with ``seeds``.
        shift: Timestep shift of the loss; above 1, noisier timesteps are drawn more often.
        snr_gamma: γ of Min-SNR weighting (2303.09556), which counts noisy timesteps less; None: no
            weighting.
        seeds: One seed per subject. Each subject then has a random stream of its own, and its LoRA
            does not depend on the other subjects. None: torch's global generator for all.
        progress_label: Label of a progress bar over the steps; None: no bar.
        on_step: Called with the step number (from 1) before each step. It may raise to stop.

    Raises:
        InvalidArgumentError: A number is out of range, or ``seeds`` and paired groups are given.
    """

    num_steps: int
    lr: float
    lr_scheduler: LrScheduler = "constant"
    lr_warmup_steps: int = 0
    batch_size: int = 1
    prior_loss_weight: float = 1.0
    snapshot_steps: Collection[int] = ()
    num_paired_groups: int = 1
    shift: float = 1.0
    snr_gamma: float | None = None
    seeds: Sequence[int] | None = None
    progress_label: str | None = None
    on_step: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        check_optimizer_settings(self.num_steps, self.lr, self.batch_size)
        check_lr_schedule(self.lr_scheduler, self.lr_warmup_steps)
        if not (isfinite(self.shift) and self.shift > 0):
            raise InvalidArgumentError(f"shift must be above 0 and finite, got {self.shift}")
        if self.snr_gamma is not None and not (isfinite(self.snr_gamma) and self.snr_gamma > 0):
            raise InvalidArgumentError(
                f"snr_gamma must be above 0 and finite, got {self.snr_gamma}"
            )
        if self.num_paired_groups < 1:
            raise InvalidArgumentError(
                f"num_paired_groups must be at least 1, got {self.num_paired_groups}"
            )
        for seed in self.seeds or ():
            validate_seed(seed)
        if self.seeds is not None and self.num_paired_groups > 1:
            raise InvalidArgumentError(
                "num_paired_groups and seeds exclude each other: give one of them"
            )

    def compute_lr(self, step: int) -> float:
        """Compute the learning rate of a step.

        Args:
            step: The number of the step, from 1.

        Returns:
            lr w f(p). w rises over the warm-up; then p goes from 0 to 1, and f(p) is 1, 1 - p or
            (1 + cos πp) / 2.
        """
        if step <= self.lr_warmup_steps:
            return self.lr * step / (self.lr_warmup_steps + 1)
        num_steps = max(1, self.num_steps - self.lr_warmup_steps)
        progress = (step - 1 - self.lr_warmup_steps) / num_steps
        factors = {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": (1 + cos(pi * progress)) / 2,
        }
        return self.lr * factors[self.lr_scheduler]

    def iterate_steps(self) -> Iterator[int]:
        """Yield step numbers from 1, with the progress bar, and call ``on_step`` before each."""
        steps = range(1, self.num_steps + 1)
        label = self.progress_label
        for step in track(steps, label, "steps", self.num_steps) if label else steps:
            if self.on_step is not None:
                self.on_step(step)
            yield step


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """Settings of ``refine_lora`` and ``refine_identity``: fit a LoRA on top of a predicted one.

    Attributes:
        num_steps: Optimizer steps, 0 or more.
        lr: Learning rate of Adam.
        batch_size: Examples of each subject per step.
        rank: Rank of the LoRA on top. None: 8 for ``refine_lora``, the predicted rank for
            ``refine_identity``.
        is_on_top: Whether ``refine_lora`` fits a LoRA on top of the predicted one, which stays
            frozen; else it fine-tunes the predicted LoRA itself, unless ``out_rank`` is larger.
        resolution: Pixels per side to which ``refine_lora`` resizes photos; None for those of the
            base, which are also the most.
        out_rank: Rank of the result, to which the sum is cut by SVD. None: the predicted rank
            plus that of the LoRA on top, which loses nothing.
        seed: Seed of the start, the noise and the sampled images.
        progress_label: Label of a progress bar over the steps; None: no bar.
        on_step: Called with the step number (from 1) before each step; by ``refine_identity`` also
            with 0 before each image that it starts from. It may raise to stop.

    Raises:
        InvalidArgumentError: A number is out of its range.
    """

    num_steps: int = 40
    lr: float = 1e-3
    batch_size: int = 4
    rank: int | None = None
    is_on_top: bool = True
    resolution: int | None = None
    out_rank: int | None = None
    seed: int = 0
    progress_label: str | None = None
    on_step: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        check_optimizer_settings(self.num_steps, self.lr, self.batch_size)
        validate_seed(self.seed)
        sizes = {"rank": self.rank, "out_rank": self.out_rank, "resolution": self.resolution}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise InvalidArgumentError(f"{name} must be at least 1, got {size}")

    def check_ranks(self, layout: LoraLayout) -> None:
        """Check that the weights of a base can have the ranks.

        Args:
            layout: The targets.

        Raises:
            InvalidArgumentError: A rank is above what any target has.
        """
        for name, rank in (("rank", self.rank), ("out_rank", self.out_rank)):
            if rank is not None:
                layout.check_rank(rank, name)

    @property
    def fine_tune(self) -> FineTuneConfig:
        """Settings of the optimization itself."""
        return FineTuneConfig(
            num_steps=self.num_steps,
            lr=self.lr,
            batch_size=self.batch_size,
            progress_label=self.progress_label,
            on_step=self.on_step,
        )


def check_lr_schedule(lr_scheduler: str, lr_warmup_steps: int) -> None:
    """Check how a learning rate rises and falls.

    Args:
        lr_scheduler: One of ``LR_SCHEDULERS``.
        lr_warmup_steps: Steps of the warm-up, 0 or more.

    Raises:
        InvalidArgumentError: The scheduler is unknown, or the number negative.
    """
    if lr_scheduler not in LR_SCHEDULERS:
        raise InvalidArgumentError(
            f"unknown lr_scheduler {lr_scheduler!r}; known: {', '.join(LR_SCHEDULERS)}"
        )
    if lr_warmup_steps < 0:
        raise InvalidArgumentError(f"lr_warmup_steps must be 0 or more, got {lr_warmup_steps}")


def check_optimizer_settings(num_steps: int, lr: float, batch_size: int) -> None:
    """Check the settings that every optimization has.

    Args:
        num_steps: Optimizer steps, 0 or more.
        lr: Learning rate, 0 or more and finite.
        batch_size: Examples per step, at least 1.

    Raises:
        InvalidArgumentError: A number is out of its range.
    """
    if num_steps < 0:
        raise InvalidArgumentError(f"num_steps must be 0 or more, got {num_steps}")
    if not (isfinite(lr) and lr >= 0):
        raise InvalidArgumentError(f"lr must be 0 or more and finite, got {lr}")
    if batch_size < 1:
        raise InvalidArgumentError(f"batch_size must be at least 1, got {batch_size}")
