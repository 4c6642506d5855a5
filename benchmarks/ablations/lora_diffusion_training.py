"""Codecs and models of the LoRA diffusion ablation: their settings and training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

from data_builder.datamodules.lora_photos import LoraPhotoDataset
from hyperlora.data.lora_dataset import LoraDataset
from hyperlora.pipelines.lora_codec import LoraCodec
from hyperlora.training.batches import LoraPhotoBatch
from hyperlora.training.datamodules.lora_rows import LoraRowsDataModule
from hyperlora.training.modules.lora_autoencoder import LoraAutoencoderTraining
from hyperlora.training.modules.lora_diffusion import LoraDiffusionTraining

Options = dict[str, Any]
CODECS: Final = ("pca", "autoencoder")


@dataclass(frozen=True)
class Variant:
    """One model of the table.

    Attributes:
        dataset: Name of the dataset of LoRAs.
        codec: One of ``CODECS``.
        mixture: One of ``GATE_MODES``.
    """

    dataset: str
    codec: str
    mixture: str

    @property
    def name(self) -> str:
        """Name of its row."""
        return f"{self.dataset}, {self.codec}, {self.mixture}"

    @property
    def folder_name(self) -> str:
        """Name of its folder."""
        return "-".join([*self.dataset.split(), self.codec, self.mixture])


@dataclass(frozen=True)
class Settings:
    """Settings of all trainings.

    Attributes:
        diffusion: Options of ``LoraDiffusionTraining``.
        autoencoder: Options of ``LoraAutoencoderTraining``.
        data: Options of ``LoraPhotoDataModule``.
        rows: Options of ``LoraRowsDataModule``.
        pca: Arguments of ``LoraCodec.fit_pca`` besides the dataset.
        num_steps: Optimizer steps of a diffusion model.
        num_codec_steps: Optimizer steps of an autoencoder.
        output_dir: Folder of codecs and models.
    """

    diffusion: Options
    autoencoder: Options
    data: Options
    rows: Options
    pca: Options
    num_steps: int
    num_codec_steps: int
    output_dir: Path


def fit_codec(settings: Settings, dataset: str, folder: Path, codec: str) -> Path:
    """Fit a codec to a dataset, unless its folder exists.

    Args:
        settings: Settings of the training.
        dataset: Name of the dataset.
        folder: Folder of the dataset.
        codec: One of ``CODECS``.

    Returns:
        Folder of the codec.
    """
    codec_dir = settings.output_dir / "-".join([*dataset.split(), codec, "codec"])
    if (codec_dir / "config.json").is_file():
        return codec_dir
    if codec == "pca":
        dataset_of_loras = LoraDataset(folder, "train")
        LoraCodec.fit_pca(dataset_of_loras, **settings.pca).save_pretrained(codec_dir)
        return codec_dir
    L.seed_everything(0, verbose=False)
    module = LoraAutoencoderTraining(
        **settings.autoencoder | {"folder": str(folder), "output_dir": str(codec_dir)}
    )
    rows = LoraRowsDataModule(str(folder), batch_size=settings.rows["batch_size"])
    _make_trainer(settings.num_codec_steps).fit(module, rows.train_dataloader())
    return codec_dir


def train_models(
    settings: Settings,
    variants: Sequence[Variant],
    dataset_dirs: dict[str, Path],
    codec_dirs: dict[tuple[str, str], Path],
) -> None:
    """Train the models whose folder does not exist.

    The photos are encoded once for all of them.

    Args:
        settings: Settings of the training.
        variants: Models.
        dataset_dirs: Folder of each dataset.
        codec_dirs: Folder of each codec, by dataset and codec.
    """
    photos: LoraPhotoDataset | None = None
    for variant in variants:
        output_dir = settings.output_dir / variant.folder_name
        if (output_dir / "config.json").is_file():
            continue
        codec_dir, folder = (
            codec_dirs[variant.dataset, variant.codec],
            dataset_dirs[variant.dataset],
        )
        L.seed_everything(0, verbose=False)
        options = settings.diffusion | {"codec": str(codec_dir), "output_dir": str(output_dir)}
        module = LoraDiffusionTraining(
            **options | {"mixture": options["mixture"] | {"mode": variant.mixture}}
        )
        if photos is None:
            photos = LoraPhotoDataset(
                str(folder),
                "train",
                module.model,
                settings.data["num_views"],
                deterministic=False,
                num_occlusions=max(1, settings.data.get("num_occlusions", 1)),
            )
        dataset = photos.with_loras(LoraDataset(folder, "train"), module.model.codec)
        loader = DataLoader(
            dataset,
            min(settings.data["batch_size"], len(dataset)),
            shuffle=True,
            drop_last=True,
            collate_fn=LoraPhotoBatch.collate,
        )
        # a longer average than a tenth of the training would remember its beginning
        average = EMAWeightAveraging(
            decay=1 - min(1.0, 10 / settings.num_steps),
            update_starting_at_step=max(1, settings.num_steps // 10),
        )
        _make_trainer(settings.num_steps, average).fit(module, loader)


def _make_trainer(num_steps: int, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        max_steps=num_steps,
        gradient_clip_val=1.0,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
