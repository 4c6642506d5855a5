"""``main_callback train``: LightningCLI over every LightningModule and DataModule, by class path."""

from collections.abc import Sequence

import lightning as L
from lightning.pytorch.cli import LightningCLI

from hyperlora.cpu import disable_malloc_trim
from hyperlora.training.callbacks import PerBatchSeed


def train(args: Sequence[str]) -> None:
    """Run LightningCLI with these command-line arguments, e.g. ``["fit", "--config", "configs/draw_portraits/vae.yaml"]``."""
    disable_malloc_trim()
    LightningCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        seed_everything_default=0,
        trainer_defaults={"callbacks": [PerBatchSeed()]},
        args=list(args),
    )
