"""``hyperlora train``: LightningCLI over every LightningModule and DataModule, by class path."""

from collections.abc import Sequence

import lightning as L
from lightning.pytorch.cli import LightningCLI


def train(arguments: Sequence[str]) -> None:
    """Run LightningCLI with these command-line arguments, e.g. ``["fit", "--config", "configs/avatars/vae.yaml"]``."""
    LightningCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        seed_everything_default=0,
        args=list(arguments),
    )
