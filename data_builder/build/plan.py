"""``PortraitDatasetConfig``: everything that decides a dataset of LoRAs. The same plan gives the same rows, however often its run is
stopped and on however many machines it goes on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from data_builder.sources.types import Photo, _parse_photo
from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.safetensors_file import write_bytes

PLAN_FILE: Final = "plan.json"
INIT_METHODS: Final = ("zero", "shared", "mean", "network")
PARAMETRIZATIONS: Final = ("lora", "locon", "lidb", "loha", "lokr")


@dataclass(frozen=True)
class Recipe:
    """How each LoRA is fitted.

    ``parametrization``: plain LoRA, LoCon (convolutions too), LiDB, or PEFT's LoHa and LoKr of rank ``inner_rank``, all stored as
    plain LoRA of ``rank``. ``init``: ΔW = 0 with random factors of each subject's own (zero) or of all subjects
    (shared, so that weight space is smooth), the mean LoRA of the dataset ``init_from``, or what the network there
    predicts from the photos. ``prompt_templates`` name the subject ``{}``: ``identifier`` where it is learned, ``class_noun``
    on the ``num_class_images`` that the base draws (DreamBooth's prior preservation). ``num_crops`` are random crops of each
    photo; photos are mirrored only where ``flip`` says that the subjects are symmetric. ``num_val_photos`` photos of each
    subject only measure it, every ``eval_every`` steps; it ends after ``patience`` looks without a better one.
    ``subjects_per_batch`` subjects make a chunk, ``variant`` names the base's files (fp16), ``storage_dtype`` is the dtype on disk.
    """

    base: str
    preset: str = "attention+mlp"
    rank: int = 4
    parametrization: str = "lora"
    inner_rank: int | None = None
    init: str = "shared"
    init_from: str = ""
    finetune_steps: int = 300
    lr: float = 1e-3
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

    def validate(self) -> None:
        """Raises ``InvalidArgumentError`` for what cannot be."""
        if self.init not in INIT_METHODS:
            raise InvalidArgumentError(
                f"unknown start {self.init!r}; known: {', '.join(INIT_METHODS)}"
            )
        if self.parametrization not in PARAMETRIZATIONS:
            raise InvalidArgumentError(
                f"unknown space {self.parametrization!r}; known: {', '.join(PARAMETRIZATIONS)}"
            )
        if self.init in ("mean", "network") and self.parametrization not in ("lora", "locon"):
            raise InvalidArgumentError(
                f"{self.parametrization} fits its own numbers and starts at zero or shared, not at {self.init!r}"
            )
        if self.init == "mean" and not self.init_from:
            raise InvalidArgumentError(
                "the mean of which dataset? Give its folder with --start-from"
            )
        if self.storage_dtype not in ("float32", "float16", "bfloat16"):
            raise InvalidArgumentError(
                f"rows are stored as float32, float16 or bfloat16, not {self.storage_dtype!r}"
            )
        if invalid_templates := [
            template for template in self.prompt_templates if template.count("{}") != 1
        ]:
            raise InvalidArgumentError(
                f"the template {invalid_templates[0]!r} must name the subject once, as {{}}: a portrait of {{}}"
            )
        for name in ("rank", "steps", "batch", "at_once", "variants", "every"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(
                    f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}"
                )


@dataclass(frozen=True)
class PlannedLora:
    """One row to be: ``repetition`` counts the LoRAs of one subject, ``seed`` decides all that chance decides for it."""

    subject: str
    photos: tuple[Photo, ...]
    seed: int
    split: str = "train"
    repetition: int = 0


@dataclass(frozen=True)
class Plan:
    """``source`` says where photos are read (``sources.opened``), ``skipped`` what was left out and why, ``warnings``
    what else is worth knowing of photos."""

    recipe: Recipe
    source: Mapping[str, Any]
    rows: tuple[PlannedLora, ...]
    skipped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_chunks(self) -> int:
        return -(-len(self.rows) // self.recipe.subjects_per_batch)

    def get_chunk(self, number: int) -> Sequence[PlannedLora]:
        subjects_per_batch = self.recipe.subjects_per_batch
        return self.rows[number * subjects_per_batch : (number + 1) * subjects_per_batch]

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything a row depends on."""
        hashed_fields = [asdict(self.recipe), dict(self.source), [asdict(row) for row in self.rows]]
        return hashlib.sha256(json.dumps(hashed_fields, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps({"digest": self.fingerprint, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Inverse of ``to_json``. Raises ``ValueError``, ``KeyError`` or ``TypeError`` for other texts."""
        data = json.loads(text)
        recipe = Recipe(**{**data["recipe"], "templates": tuple(data["recipe"]["templates"])})
        rows = tuple(
            PlannedLora(**{**row, "photos": tuple(map(_parse_photo, row["photos"]))})
            for row in data["rows"]
        )
        return cls(
            recipe,
            data["source"],
            rows,
            tuple(data["skipped"]),
            tuple(data["remarks"]),
            data["notes"],
        )


def write_plan(plan: Plan, folder: Path) -> None:
    """``folder/plan.json``; does nothing if the same plan is there. Raises ``InvalidArgumentError`` if another one is."""
    if (folder / PLAN_FILE).exists():
        if read_plan(folder).fingerprint == plan.fingerprint:
            return
        raise InvalidArgumentError(
            f"{str(folder)!r} holds another plan: run that one, or choose another folder"
        )
    write_bytes(plan.to_json().encode(), folder / PLAN_FILE)


def read_plan(folder: Path) -> Plan:
    """Raises ``InvalidArgumentError`` for a folder without a plan or with a damaged one."""
    file = folder / PLAN_FILE
    if not file.is_file():
        raise InvalidArgumentError(
            f"{str(folder)!r} holds no plan.json: make one first, data-builder plan SOURCE -o {folder}"
        )
    try:
        return Plan.from_json(file.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgumentError(
            f"{str(file)!r} is no plan ({' '.join(str(error).split())[:100]}): make it again"
        ) from error


def replace_invalid_utf8(text: str) -> str:
    """``text`` without the bytes that are no UTF-8, which names of files may hold."""
    return text.encode("utf-8", "replace").decode()


def compute_subject_seed(recipe_seed: int, subject: str, repetition: int) -> int:
    """A subject's own seed, whatever its place in the list."""
    digest = hashlib.sha256(
        f"{recipe_seed}/{subject}/{repetition}".encode("utf-8", "surrogateescape")
    ).digest()
    return int.from_bytes(digest[:6], "big")
