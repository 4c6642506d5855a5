"""``PhotoFolderDataModule``: photos of subjects from a user's own sources, for a hypernetwork."""

import logging
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from hyperlora.data.aspect_buckets import SIDE_MULTIPLE
from hyperlora.data.hub_subjects import HubStream
from hyperlora.data.open_subject_source import SubjectSourceConfig, open_subject_source
from hyperlora.errors import InvalidArgumentError
from hyperlora.progress import track
from hyperlora.training.augmentation import AugmentationConfig
from hyperlora.training.batches import SubjectBatch
from hyperlora.training.datamodules.base import FolderDataModule, Sample
from hyperlora.training.datamodules.face_filter import FaceFilterConfig, FaceIndex
from hyperlora.training.datamodules.photo_dataset import (
    BatchPlanSampler,
    EpochPlanner,
    PhotoDataset,
)
from hyperlora.training.datamodules.photo_samples import SampleConfig, SampleMaker
from hyperlora.training.datamodules.photo_split import (
    PhotoSplit,
    RankShare,
    SinglePhotos,
    add_generated_views,
    assign_buckets,
    filter_faces,
    handle_single_photos,
    list_target_jobs,
)
from hyperlora.training.datamodules.photo_stream import (
    PhotoStreamDataset,
    PhotoStreamLoader,
    StreamFaceCheck,
)
from hyperlora.training.datamodules.target_cache import TargetCacheConfig, open_target_cache

DEFAULT_SOURCE: Final = SubjectSourceConfig()
DEFAULT_AUGMENTATION: Final = AugmentationConfig()


class PhotoFolderDataModule(FolderDataModule):
    """Load reference photos and other photos of the same subjects, with captions.

    Photos come from a folder, a Hugging Face dataset or WebDataset shards; what was found is said
    before training. Of a subject with too few photos some come twice. A target is never one of the
    references. Of a subject with one photo both are different views. Validation uses the same
    photos every time, with one target each. A subject's id is its index in its source.

    Args:
        folder: Training subjects: a folder of photos (``hyperlora.data.subject_layouts``), a
            dataset on disk or on the hub, or ``.tar`` shards.
        validation: The same for validation subjects.
        resolution: Side of square target images in pixels, the base's.
        encoder_size: Side of reference photos in pixels, the encoder's.
        batch_size: Subjects per device and step.
        num_views: Reference photos per subject.
        num_targets: Target photos per subject.
        num_crops: Crops from which a target is drawn: 1 for the middle of the photo, more for
            random ones besides. A subject with one photo has at least 4.
        class_noun: What a caption calls any such subject.
        identifier: What is put before the class noun for the subject itself: "a person in the
            rain" becomes "sks person in the rain".
        prompt_template: Caption of photos that have none, with ``{identifier} {class_noun}``.
        num_workers: Processes that load photos.
        source: How ``folder`` and ``validation`` are read.
        single_photos: What becomes of subjects with one photo: ``views`` (reference and target are
            different views of it), ``identical`` (they are the same, so the network learns to copy)
            or ``skip``.
        generated_views: Folder with a sub-folder of generated images for each subject, by its
            name. They are references, and never targets.
        augmentation: How far views differ from their photos.
        faces: Which photos of persons are good enough; None to use all, uncropped.
        cache: Where latents and embeddings of the targets are kept, so that training needs neither
            VAE nor text encoders; None to compute them in every step.
        aspect_buckets: Whether targets keep about the shape of their photos, in batches of one
            size of the same area. Otherwise they are squares.

    Raises:
        InvalidImageError: A folder has no subjects, or is suspected to be misread.
        InvalidArgumentError: There are fewer training subjects than one step takes, or options
            contradict each other.
    """

    sample_noun = "subjects"

    def __init__(
        self,
        folder: str,
        validation: str,
        resolution: int,
        encoder_size: int = 224,
        batch_size: int = 4,
        num_views: int = 4,
        num_targets: int = 1,
        num_crops: int = 1,
        class_noun: str = "person",
        identifier: str = "sks",
        prompt_template: str = "a photo of {identifier} {class_noun}",
        num_workers: int = 4,
        source: SubjectSourceConfig = DEFAULT_SOURCE,
        single_photos: SinglePhotos = "views",
        generated_views: str | None = None,
        augmentation: AugmentationConfig = DEFAULT_AUGMENTATION,
        faces: FaceFilterConfig | None = None,
        cache: TargetCacheConfig | None = None,
        aspect_buckets: bool = False,
    ) -> None:
        super().__init__()
        # checkpoints hold plain values only
        self.save_hyperparameters(ignore=["source", "augmentation", "faces", "cache"], logger=False)
        self.source, self.augmentation, self.faces, self.cache = source, augmentation, faces, cache
        self._splits: dict[bool, PhotoSplit] = {}
        self._stream_data: PhotoStreamDataset | None = None
        self._positions: list[dict[str, Any]] | None = None  # of all ranks, from a checkpoint
        for training in (True, False):  # a wrong path is an error now, not after the base is loaded
            open_subject_source(self._get_name(training), source, training)
        if single_photos == "views" and not augmentation.changes_images:
            raise InvalidArgumentError(
                "augmentation changes nothing, so that a single photo would be its own target: "
                "lower min_crop_scale, raise color_jitter, or set single_photos to identical"
            )
        if aspect_buckets and resolution < 2 * SIDE_MULTIPLE:
            raise InvalidArgumentError(
                f"aspect_buckets need a resolution of at least {2 * SIDE_MULTIPLE}, and "
                f"{resolution} was given: leave them out"
            )

    def setup(self, stage: str) -> None:
        """Read the sources, inspect faces and fill the cache, once.

        Args:
            stage: ``fit`` or ``validate``.
        """
        for training in (True, False) if stage == "fit" else (False,):
            self._get_split(training)

    def make_dataset(self, training: bool) -> PhotoDataset:
        """Make the dataset of training, or else of validation."""
        split = self._get_split(training)
        assert split.stream is None, "a stream has no dataset with a length"
        return PhotoDataset(split.subjects, split.maker, split.get_size)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Make the loader of training batches, in another order in each epoch.

        Raises:
            InvalidArgumentError: The source has fewer subjects or shards than one step takes.
        """
        if self._get_split(training=True).stream is None:
            return super().train_dataloader()
        return self._make_stream_loader(self._get_split(training=True))

    def describe(self) -> list[str]:
        """Say what was found in both sources, and what was left out, a sentence each."""
        return [note for training in (True, False) for note in self._get_split(training).notes]

    def _make_loader(self, data: Any, training: bool) -> DataLoader[Sample]:  # noqa: ANN401
        split, share = self._get_split(training), self._get_share()
        planner = EpochPlanner(
            split.subjects, split.maker, self.hparams["batch_size"], _get_seed(), split.get_size
        )
        plan_epoch = planner.plan_training if training else planner.plan_validation
        num_batches = planner.num_training_batches if training else len(plan_epoch(0))
        sampler = BatchPlanSampler(
            plan_epoch, num_batches, share.num_ranks, share.rank, drop_last=training
        )
        return self._make_batch_loader(data, sampler)

    def _make_stream_loader(self, split: PhotoSplit) -> DataLoader[Sample]:
        assert split.stream is not None
        share, num_workers = self._get_share(), self.hparams["num_workers"]
        split.stream.check_num_readers(share.num_ranks * max(1, num_workers))
        data = PhotoStreamDataset(
            split.stream,
            split.maker,
            self.hparams["batch_size"],
            _get_seed(),
            split.face_check,
            split.get_size,
        )
        data.rank, data.num_ranks = share.rank, share.num_ranks
        if self._positions is not None and len(self._positions) == share.num_ranks:
            is_restored = data.restore_position(self._positions[share.rank], num_workers)
        else:
            is_restored = False
        if self.trainer and self.trainer.global_step and not is_restored:
            data.seed += self.trainer.global_step  # other subjects than those of the first steps
            _log_notes(
                [
                    f"warning: {split.stream.name}: the checkpoint has no position for "
                    f"{share.num_ranks} devices with {num_workers} loader processes each, so the "
                    "stream begins again in another order."
                ]
            )
        self._stream_data = data
        return PhotoStreamLoader(data, num_workers, _pins_memory(num_workers))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ANN401
        """Note how far a stream is trained on.

        Args:
            batch: A batch that is about to be trained on, or another one.
            dataloader_idx: Not used.

        Returns:
            The batch.
        """
        if self._stream_data is not None and isinstance(batch, SubjectBatch) and batch.progress:
            self._stream_data.record_batch(batch.progress, self.hparams["num_workers"])
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the positions of all ranks in a stream; all ranks call this at once."""
        if self._stream_data is None:
            return {}
        position = self._stream_data.get_position(self.hparams["num_workers"])
        positions = [position] * self._stream_data.num_ranks
        if self._stream_data.num_ranks > 1:
            torch.distributed.all_gather_object(positions, position)
        return {"stream_positions": positions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the positions for the loader, which is made later.

        Args:
            state_dict: As ``state_dict`` returns it.
        """
        self._positions = state_dict.get("stream_positions")

    def _make_batch_loader(self, data: Any, sampler: Any) -> DataLoader[Sample]:  # noqa: ANN401
        num_workers = self.hparams["num_workers"]
        return DataLoader(
            data,
            batch_size=None,  # the dataset makes whole batches
            sampler=sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=_pins_memory(num_workers),
        )

    def _get_name(self, training: bool) -> str:
        return str(self.hparams["folder" if training else "validation"])

    def _get_share(self) -> RankShare:
        return RankShare.from_trainer(self.trainer)

    def _get_split(self, training: bool) -> PhotoSplit:
        """Return one split; it is read at the first time, and what was found is said."""
        if training not in self._splits:
            self._splits[training] = split = self._read_split(training)
            _log_notes(split.notes)
        return self._splits[training]

    def _make_sample_config(self, training: bool) -> SampleConfig:
        h = self.hparams
        return SampleConfig(
            source=self._get_name(training),
            encoder_size=h["encoder_size"],
            resolution=h["resolution"],
            num_views=h["num_views"],
            num_targets=h["num_targets"] if training else 1,
            num_crops=h["num_crops"] if training else 1,
            identifier=h["identifier"],
            class_noun=h["class_noun"],
            template=h["prompt_template"].format(
                identifier=h["identifier"], class_noun=h["class_noun"]
            ),
            augmentation=self.augmentation,
            identical_targets=h["single_photos"] == "identical",
            face_margin=self.faces.crop_margin
            if self.faces and self.faces.crop_references
            else None,
            face_detector=f"{self.faces.pack} {self.faces.det_size}" if self.faces else "",
        )

    def _read_split(self, training: bool) -> PhotoSplit:
        h, config = self.hparams, self._make_sample_config(training)
        source = open_subject_source(config.source, self.source, training)
        if isinstance(source, HubStream) and training:
            return self._read_stream(source, config)
        split = PhotoSplit(source.list_subjects(), SampleMaker(config))
        split.add_source_notes(source)
        if self.faces is not None:
            cache_dir = Path(self.cache.folder) / "faces" if self.cache else None
            split = filter_faces(split, FaceIndex(self.faces, cache_dir), self._get_share())
        if h["generated_views"] and training:
            split = add_generated_views(split, h["generated_views"])
        split = handle_single_photos(split, h["single_photos"])
        if h["aspect_buckets"]:
            split = assign_buckets(split, h["resolution"])
        if self.cache is not None:
            split = self._fill_cache(split, self.cache)
        return split

    def _fill_cache(self, split: PhotoSplit, config: TargetCacheConfig) -> PhotoSplit:
        """Fill the cache with this rank's share, and leave out photos that no rank could read."""
        share = self._get_share()
        jobs, prompts = list_target_jobs(split)
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        cache = open_target_cache(
            config, device, share.select(jobs), share.select(prompts), partial(_track, "latents")
        )
        share.wait()
        return split.with_cache(cache, jobs)

    def _read_stream(self, stream: HubStream, config: SampleConfig) -> PhotoSplit:
        h = self.hparams
        for name, value in (("cache", self.cache), ("generated_views", h["generated_views"])):
            if value is not None:
                raise InvalidArgumentError(
                    f"{name} needs all photos at once, and {config.source!r} is a stream: leave "
                    "it out, or set source.streaming to false"
                )
        if h["single_photos"] == "skip":
            raise InvalidArgumentError(
                f"single_photos skip needs all photos at once, and {config.source!r} is a stream: "
                "use views"
            )
        split = PhotoSplit([], SampleMaker(config, {}), stream=stream)
        split.notes.append(f"{stream.name}: a stream of {stream.num_shards} shards, ")
        split.notes[-1] += f"{stream.layout_note}."
        if self.faces is not None:
            split.face_check = StreamFaceCheck(FaceIndex(self.faces), split.maker)
        if h["aspect_buckets"]:
            split = assign_buckets(split, h["resolution"])
        return split


@rank_zero_only
def _log_notes(notes: Sequence[str]) -> None:
    """Say what was found, among the lines of Lightning, which reach the terminal."""
    logger = logging.getLogger("lightning.pytorch.hyperlora")
    for note in notes:
        level = logging.WARNING if note.startswith("warning: ") else logging.INFO
        logger.log(level, note.removeprefix("warning: "))


def _track(unit: str, items: Sequence[Any]) -> Iterable[Any]:
    """Show progress while photos are encoded."""
    return track(items, f"caching {unit}", "photos", len(items))


def _pins_memory(num_workers: int) -> bool:
    return num_workers > 0 and torch.accelerator.is_available()


def _get_seed() -> int:
    """The run's seed, which ``seed_everything`` keeps in the environment."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
