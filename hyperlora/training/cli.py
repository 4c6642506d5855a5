"""``hyperlora train``: LightningCLI over every LightningModule and DataModule, by class path."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from hyperlora.cpu import disable_malloc_trim
from hyperlora.errors import InvalidArgumentError
from hyperlora.pretrained import REPOSITORY_URL
from hyperlora.training.callbacks import PerBatchSeed

RUNS_DIR: Final = Path("runs")
"""Folder of all runs, relative to the working directory."""
CHECKPOINT_INTERVAL: Final = 250
"""Default number of steps between checkpoints."""


class TrainingCLI(LightningCLI):
    """LightningCLI with a key ``run_name`` that decides where a run writes.

    ``runs/<run_name>`` receives ``last.ckpt``, written every ``checkpoint.every_n_train_steps``
    steps, and the metrics as CSV. ``--ckpt_path runs/<run_name>/last.ckpt`` resumes the run.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``run_name`` and the options of the checkpoint callback, ``checkpoint.*``."""
        parser.add_argument(
            "--run_name", type=str, required=True, help="Folder of the run below runs/."
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.every_n_train_steps": CHECKPOINT_INTERVAL,
                "checkpoint.save_last": True,
                "checkpoint.save_top_k": 0,
            }
        )

    def before_instantiate_classes(self) -> None:
        """Set the folders that the configuration leaves open to ``runs/<run_name>``."""
        config = self.config[self.subcommand]
        run_dir = str(RUNS_DIR / config.run_name)
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = run_dir
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = run_dir

    def instantiate_trainer(self, **kwargs: object) -> L.Trainer:
        """Instantiate the trainer, with a CSV logger unless the configuration has another."""
        trainer_config = self.config_init[self.subcommand].trainer
        if trainer_config.logger is None:
            kwargs["logger"] = CSVLogger(trainer_config.default_root_dir)
        return super().instantiate_trainer(**kwargs)


class _ConfigReader(TrainingCLI):
    """Reads and checks a configuration; makes and runs nothing."""

    def instantiate_classes(self) -> None:
        """Make nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def train(args: Sequence[str]) -> None:
    """Run a subcommand of LightningCLI, or print what one would take.

    Args:
        args: Command-line arguments, e.g. ``["fit", "--config", "configs/avatars/01_vae.yaml"]``.
            With ``estimate`` instead of ``fit``, the memory of the training is printed.

    Raises:
        InvalidArgumentError: A config of the repository is given where there is no repository.
    """
    _check_config_paths(args)
    disable_malloc_trim()
    if args[:1] == ["estimate"]:
        cli = _run_cli(_ConfigReader, ["fit", *args[1:]])
        from hyperlora.training.estimate_config import estimate_config

        estimate_config(cli.config["fit"].as_dict()).print_table()
    else:
        _run_cli(TrainingCLI, args)


def _run_cli(cli_class: type[TrainingCLI], args: Sequence[str]) -> TrainingCLI:
    return cli_class(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        seed_everything_default=0,
        trainer_defaults={
            "callbacks": [PerBatchSeed()],
            "check_val_every_n_epoch": None,  # validation by steps, not epochs
            "gradient_clip_val": 1.0,
        },
        args=list(args),
    )


def _check_config_paths(args: Sequence[str]) -> None:
    for path in (Path(argument.removeprefix("--config=")) for argument in args):
        if path.parts[:1] == ("configs",) and path.suffix == ".yaml" and not path.is_file():
            raise InvalidArgumentError(
                f"{str(path)!r} does not exist: the configs are no part of the package, "
                f"run the command in a clone of {REPOSITORY_URL}"
            )
