"""``hyperlora train``: LightningCLI over every LightningModule and DataModule, by class path."""

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from hyperlora.cpu import disable_malloc_trim
from hyperlora.errors import HyperloraError, InvalidArgumentError
from hyperlora.pretrained import REPOSITORY_URL
from hyperlora.training.callbacks import PerBatchSeed

RUNS_DIR: Final = Path("runs")
"""Folder of all runs, relative to the working directory."""
CHECKPOINT_INTERVAL: Final = 250
"""Default number of steps between checkpoints."""


class TrainingCLI(LightningCLI):
    """LightningCLI with a key ``run_name`` that decides where a run writes.

    ``runs/<run_name>`` receives ``last.ckpt``, written every ``checkpoint.every_n_train_steps``
    steps, and the metrics as CSV and for TensorBoard. ``--ckpt_path runs/<run_name>/last.ckpt``
    resumes the run.
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

    def _parse_ckpt_path(self) -> None:
        """Resume as the configuration says: Lightning would prefer what the checkpoint was made by.

        Then ``lr`` or ``output_dir`` on the command line would have no effect.
        """

    def _set_seed(self) -> None:
        """Seed everything.

        Raises:
            InvalidArgumentError: The seed is one that numpy does not take.
        """
        seed = self._get(self.config, "seed_everything")
        if isinstance(seed, int) and not 0 <= seed < 2**32:
            raise InvalidArgumentError(
                f"seed_everything from 0 to {2**32 - 1} expected, which numpy takes, got {seed}"
            )
        super()._set_seed()

    def instantiate_classes(self) -> None:
        """Instantiate all classes.

        Raises:
            HyperloraError: A class refuses its arguments: its own sentence, which jsonargparse
                would hide among all arguments.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, HyperloraError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None

    def instantiate_trainer(self, **kwargs: object) -> L.Trainer:
        """Instantiate the trainer, with CSV and TensorBoard unless the configuration has loggers.

        TensorBoard comes with the extra ``train``, and is left out where it is not installed.
        """
        trainer_config = self.config_init[self.subcommand].trainer
        if trainer_config.logger is None:
            run_dir = trainer_config.default_root_dir
            loggers: list[Logger] = [CSVLogger(run_dir)]
            if find_spec("tensorboard"):
                loggers.append(TensorBoardLogger(run_dir, name="tensorboard"))
            kwargs["logger"] = loggers
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Check that there was something to train on.

        Raises:
            InvalidArgumentError: The data give no batch, and so nothing was trained or written.
        """
        if self.trainer.num_training_batches == 0:
            raise InvalidArgumentError(
                "the training data are smaller than one batch, so nothing was trained: lower "
                "data.init_args.batch_size"
            )


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
        from hyperlora.training.estimate_config import estimate_config

        estimate_config(parse_config(args[1:])).print_table()
    else:
        _run_cli(TrainingCLI, args)


def parse_config(args: Sequence[str]) -> dict[str, Any]:
    """Read and check the arguments of ``fit`` without making anything.

    Args:
        args: What follows ``fit`` on the command line.

    Returns:
        All options, with their defaults.
    """
    return _run_cli(_ConfigReader, ["fit", *args]).config["fit"].as_dict()


def _run_cli(cli_class: type[TrainingCLI], args: Sequence[str]) -> TrainingCLI:
    # it warns that sys.argv is not used, which is what `args` is for
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
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
