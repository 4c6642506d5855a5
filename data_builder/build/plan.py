"""Plans of LoRA datasets: everything that decides the rows of a build.

The same plan gives the same rows, however often its run is interrupted and on however many
machines.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Final

from data_builder.sources.types import Photo, SourceConfig, parse_photo
from hyperlora.diffusion.target_modules import TARGET_PRESETS
from hyperlora.errors import InvalidArgumentError
from hyperlora.finetuning.config import LrScheduler, check_lr_schedule
from hyperlora.lora.io.safetensors_file import write_bytes
from hyperlora.seeds import validate_seed

PLAN_FILE: Final = "plan.json"
PLAN_KEY: Final = "hyperlora.plan"
SKIPPED_KEY: Final = "hyperlora.skipped"
"""Metadata keys of a shard: fingerprint of its plan, and why rows are missing (one line each)."""
INIT_METHODS: Final = ("zero", "shared", "mean", "network")
PARAMETRIZATIONS: Final = ("lora", "locon", "lidb", "loha", "lokr")
STORAGE_DTYPES: Final = ("float32", "float16", "bfloat16")
_POSITIVE_FIELDS: Final = (
    "rank",
    "finetune_steps",
    "batch_size",
    "subjects_per_batch",
    "num_crops",
    "eval_every",
)
_LATER_FIELDS: Final = (
    "lr_scheduler",
    "lr_warmup_steps",
    "timestep_shift",
    "snr_gamma",
    "shared_noise",
)
"""Fields that came after the first release; fingerprints leave out their defaults, so that builds
of an older version go on."""


@dataclass(frozen=True)
class Recipe:
    """How each LoRA is fitted. ``validate`` checks the values.

    Attributes:
        base: Base model, a folder or hub id.
        preset: Adapted modules, e.g. ``attention+mlp``.
        text_encoders: Whether the CLIP text encoders are adapted, too.
        rank: Rank of the stored LoRAs.
        parametrization: What is fitted: ``lora``, ``locon`` (convolutions too), ``lidb``, or PEFT's
            ``loha`` and ``lokr``. All are stored as plain LoRA.
        inner_rank: Rank inside LoHa and LoKr; None: chosen from ``rank``.
        init: Start of each fit. ``zero`` and ``shared``: ΔW = 0 with random factors of each
            subject, or the same for all. ``mean``: mean LoRA of a dataset. ``network``: prediction
            of a network from the photos.
        init_from: Folder of that dataset or network.
        finetune_steps: Optimizer steps of each subject.
        lr: Peak learning rate of Adam.
        lr_scheduler: ``constant``, ``linear`` or ``cosine``: how it falls, in the end to 0.
        lr_warmup_steps: Steps over which it rises from 0.
        timestep_shift: Above 1, noisier timesteps are drawn more often.
        snr_gamma: γ of Min-SNR weighting (2303.09556), which counts noisy timesteps less: there the
            gradients of photos differ most; None: no weighting.
        batch_size: Examples of each subject per step.
        subjects_per_batch: Subjects that are fitted together; they form a chunk.
        identifier: Phrase for the subject in training prompts.
        class_noun: Phrase for the subject in prompts of class images.
        prompt_templates: Captions with ``{}`` for the subject.
        num_class_images: Class images that the base samples for prior preservation (DreamBooth,
            2208.12242, eq. 2).
        prior_loss_weight: Weight of the prior preservation loss.
        num_crops: Crops of each photo: the whole square, then random ones.
        flip: Whether to add mirrored photos; for symmetric subjects.
        num_val_photos: Photos of each subject that only evaluate its LoRA.
        eval_every: Steps between evaluations of a subject's loss.
        patience: Evaluations without improvement after which a subject stops; None: never.
        dtype: Precision of the base: ``float32``, ``bfloat16`` or ``float16``.
        variant: Variant of the base's files, e.g. ``fp16``.
        gradient_checkpointing: Whether to trade computation for memory.
        storage_dtype: Precision of the stored LoRAs.
        seed: Seed of all random choices.
        shared_noise: Whether all subjects draw the same noise, timesteps and order of photos: LoRAs
            then differ by their photos alone, which models of LoRAs learn from more easily.
    """

    base: str
    preset: str = "attention+mlp"
    text_encoders: bool = False
    rank: int = 4
    parametrization: str = "lora"
    inner_rank: int | None = None
    init: str = "shared"
    init_from: str = ""
    finetune_steps: int = 300
    lr: float = 1e-3
    lr_scheduler: LrScheduler = "constant"
    lr_warmup_steps: int = 0
    timestep_shift: float = 1.0
    snr_gamma: float | None = None
    batch_size: int = 2
    subjects_per_batch: int = 16
    identifier: str = "sks person"
    class_noun: str = "a person"
    prompt_templates: tuple[str, ...] = ("a portrait of {}",)
    num_class_images: int = 0
    prior_loss_weight: float = 1.0
    num_crops: int = 1
    flip: bool = False
    num_val_photos: int = 0
    eval_every: int = 25
    patience: int | None = None
    dtype: str = "float32"
    variant: str | None = None
    gradient_checkpointing: bool = False
    storage_dtype: str = "float16"
    seed: int = 0
    shared_noise: bool = False

    @property
    def denoiser_preset(self) -> str:
        """Preset of the adapted modules, with convolutions for ``locon``."""
        return "attention+conv" if self.parametrization == "locon" else self.preset

    def validate(self) -> None:
        """Raise ``InvalidArgumentError`` for values that are unknown, out of range or do not fit
        together.
        """
        validate_seed(self.seed)
        check_lr_schedule(self.lr_scheduler, self.lr_warmup_steps)
        if not 0 < self.timestep_shift < float("inf"):
            raise InvalidArgumentError(
                f"--timestep-shift must be above 0 and finite, got {self.timestep_shift}"
            )
        if self.snr_gamma is not None and not 0 < self.snr_gamma < float("inf"):
            raise InvalidArgumentError(
                f"--snr-gamma must be above 0 and finite, got {self.snr_gamma}"
            )
        choices = {
            "preset": TARGET_PRESETS,
            "dtype": ("float32", "bfloat16", "float16"),
            "init": INIT_METHODS,
            "parametrization": PARAMETRIZATIONS,
            "storage_dtype": STORAGE_DTYPES,
        }
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise InvalidArgumentError(
                    f"unknown {_format_option(name)} {value!r}; known: {', '.join(known)}"
                )
        if self.init in ("mean", "network") and self.parametrization not in ("lora", "locon"):
            raise InvalidArgumentError(
                f"{self.parametrization} fits its own parameters and starts from zero or shared, "
                f"not from {self.init!r}"
            )
        if self.init == "mean" and not self.init_from:
            raise InvalidArgumentError(
                "--init mean needs a dataset of LoRAs: give its folder with --init-from"
            )
        for template in self.prompt_templates:
            if template.count("{}") != 1:
                raise InvalidArgumentError(
                    f"the template {template!r} must name the subject once, as {{}}: "
                    "a portrait of {}"
                )
        for name in ("lr", "prior_loss_weight"):
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise InvalidArgumentError(
                    f"{_format_option(name)} must be 0 or more and finite, got {value}"
                )
        for name in _POSITIVE_FIELDS:
            if (value := getattr(self, name)) < 1:
                raise InvalidArgumentError(
                    f"{_format_option(name)} must be at least 1, got {value}"
                )


@dataclass(frozen=True)
class PlannedLora:
    """A row of the dataset to build.

    Attributes:
        subject: Name of the subject.
        photos: Photos of the subject.
        seed: Seed of every random choice for this row.
        split: ``train``, ``validation`` or ``test``.
        repetition: Number of this LoRA among those of the subject.
    """

    subject: str
    photos: tuple[Photo, ...]
    seed: int
    split: str = "train"
    repetition: int = 0


@dataclass(frozen=True)
class Plan:
    """Everything that decides the rows of a build.

    Attributes:
        recipe: How each LoRA is fitted.
        source: Source of the photos, see ``source_from_dict``.
        rows: LoRAs to build, in order.
        skipped: Photos and subjects that were left out, with reasons.
        warnings: Further sentences about photos.
        metadata: Facts about the plan, e.g. the license of the face pack.
    """

    recipe: Recipe
    source: SourceConfig
    rows: tuple[PlannedLora, ...]
    skipped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_chunks(self) -> int:
        """Number of chunks of ``recipe.subjects_per_batch`` rows."""
        return -(-len(self.rows) // self.recipe.subjects_per_batch)

    def get_chunk(self, number: int) -> Sequence[PlannedLora]:
        """Return the rows of a chunk by its number."""
        subjects_per_batch = self.recipe.subjects_per_batch
        return self.rows[number * subjects_per_batch : (number + 1) * subjects_per_batch]

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that depend on all that rows depend on."""
        recipe = {
            field.name: getattr(self.recipe, field.name)
            for field in fields(Recipe)
            if field.name not in _LATER_FIELDS or getattr(self.recipe, field.name) != field.default
        }
        hashed_fields = [recipe, dict(self.source), [asdict(row) for row in self.rows]]
        return hashlib.sha256(json.dumps(hashed_fields, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Format the plan as JSON; undone by ``from_json``."""
        return json.dumps({"fingerprint": self.fingerprint, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Parse the JSON that ``to_json`` writes.

        Raises:
            ValueError: If the text is no JSON.
            KeyError: If a field is missing.
            TypeError: If a field is unknown.
        """
        data = json.loads(text)
        templates = tuple(data["recipe"]["prompt_templates"])
        recipe = Recipe(**{**data["recipe"], "prompt_templates": templates})
        rows = tuple(
            PlannedLora(**{**row, "photos": tuple(map(parse_photo, row["photos"]))})
            for row in data["rows"]
        )
        return cls(
            recipe,
            data["source"],
            rows,
            tuple(data["skipped"]),
            tuple(data["warnings"]),
            data["metadata"],
        )


def write_plan(plan: Plan, folder: Path) -> None:
    """Write ``plan.json`` into the folder of a build; does nothing if it holds the same plan.

    Args:
        plan: Plan to write.
        folder: Folder of the build.

    Raises:
        InvalidArgumentError: If the folder holds another plan.
    """
    if (folder / PLAN_FILE).exists():
        if read_plan(folder).fingerprint == plan.fingerprint:
            return
        raise InvalidArgumentError(
            f"{str(folder)!r} holds another plan: run that one, or choose another folder"
        )
    write_bytes(plan.to_json().encode(), folder / PLAN_FILE)


def read_plan(folder: Path) -> Plan:
    """Read the plan of the build in ``folder``.

    Raises:
        InvalidArgumentError: If the folder holds no plan or a damaged one.
    """
    file = folder / PLAN_FILE
    if not file.is_file():
        raise InvalidArgumentError(
            f"{str(folder)!r} holds no plan.json: make one first, "
            f"data-builder plan SOURCE -o {folder}"
        )
    try:
        return Plan.from_json(file.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InvalidArgumentError(f"{str(file)!r} is no plan ({reason}): make it again") from error


def replace_invalid_utf8(text: str) -> str:
    """Replace bytes of file names that are no UTF-8."""
    return text.encode("utf-8", "replace").decode()


def compute_subject_seed(recipe_seed: int, subject: str, repetition: int) -> int:
    """Compute the seed of a row, which does not depend on its position.

    Args:
        recipe_seed: Seed of the recipe.
        subject: Name of the subject.
        repetition: Number of the LoRA among those of the subject.

    Returns:
        Integer below 2^48.
    """
    digest = hashlib.sha256(
        f"{recipe_seed}/{subject}/{repetition}".encode("utf-8", "surrogateescape")
    ).digest()
    return int.from_bytes(digest[:6], "big")


def _format_option(field_name: str) -> str:
    """Name of the command-line option of a field of ``Recipe``, without dashes in front."""
    return field_name.replace("_", "-")
