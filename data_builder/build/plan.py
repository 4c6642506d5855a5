"""``Plan``: everything that decides a dataset of LoRAs. The same plan gives the same rows, however often its run is
stopped and on however many machines it goes on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from data_builder.sources.types import Photo, _photo
from hyperlora.errors import BadRequest
from hyperlora.lora.io.safetensors_file import write_bytes

FILE: Final = "plan.json"
STARTS: Final = ("zero", "shared", "mean", "network")
SPACES: Final = ("lora", "locon", "lidb", "loha", "lokr")


@dataclass(frozen=True)
class Recipe:
    """How each LoRA is fitted.

    ``space``: plain LoRA, LoCon (convolutions too), LiDB, or PEFT's LoHa and LoKr of rank ``inner``, all stored as
    plain LoRA of ``rank``. ``start``: ΔW = 0 with random factors of each subject's own (zero) or of all subjects
    (shared, so that weight space is smooth), the mean LoRA of the dataset ``start_from``, or what the network there
    predicts from the photos. ``templates`` name the subject ``{}``: ``identifier`` where it is learned, ``class_name``
    on the ``prior_images`` that the base draws (DreamBooth's prior preservation). ``variants`` are random crops of each
    photo; photos are mirrored only where ``flip`` says that the subjects are symmetric. ``held_out`` photos of each
    subject only measure it, every ``every`` steps; it ends after ``patience`` looks without a better one.
    ``at_once`` subjects make a chunk, ``variant`` names the base's files (fp16), ``rows`` is the dtype on disk.
    """

    base: str
    preset: str = "attention+mlp"
    rank: int = 4
    space: str = "lora"
    inner: int | None = None
    start: str = "shared"
    start_from: str = ""
    steps: int = 300
    lr: float = 1e-3
    batch: int = 2
    at_once: int = 16
    identifier: str = "sks person"
    class_name: str = "a person"
    templates: tuple[str, ...] = ("a portrait of {}",)
    prior_images: int = 0
    prior_weight: float = 1.0
    variants: int = 1
    flip: bool = False
    held_out: int = 0
    every: int = 25
    patience: int | None = None
    dtype: str = "float32"
    variant: str | None = None
    checkpointing: bool = False
    rows: str = "float16"
    seed: int = 0

    def check(self) -> None:
        """Raises ``BadRequest`` for what cannot be."""
        if self.start not in STARTS:
            raise BadRequest(f"unknown start {self.start!r}; known: {', '.join(STARTS)}")
        if self.space not in SPACES:
            raise BadRequest(f"unknown space {self.space!r}; known: {', '.join(SPACES)}")
        if self.start in ("mean", "network") and self.space not in ("lora", "locon"):
            raise BadRequest(f"{self.space} fits its own numbers and starts at zero or shared, not at {self.start!r}")
        if self.start == "mean" and not self.start_from:
            raise BadRequest("the mean of which dataset? Give its folder with --start-from")
        if self.rows not in ("float32", "float16", "bfloat16"):
            raise BadRequest(f"rows are stored as float32, float16 or bfloat16, not {self.rows!r}")
        if bad := [template for template in self.templates if template.count("{}") != 1]:
            raise BadRequest(f"the template {bad[0]!r} must name the subject once, as {{}}: a portrait of {{}}")
        for name in ("rank", "steps", "batch", "at_once", "variants", "every"):
            if getattr(self, name) < 1:
                raise BadRequest(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Planned:
    """One row to be: ``view`` counts the LoRAs of one subject, ``seed`` decides all that chance decides for it."""

    subject: str
    photos: tuple[Photo, ...]
    seed: int
    split: str = "train"
    view: int = 0


@dataclass(frozen=True)
class Plan:
    """``source`` says where photos are read (``sources.opened``), ``skipped`` what was left out and why, ``remarks``
    what else is worth knowing of photos."""

    recipe: Recipe
    source: Mapping[str, Any]
    rows: tuple[Planned, ...]
    skipped: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def chunks(self) -> int:
        return -(-len(self.rows) // self.recipe.at_once)

    def chunk(self, number: int) -> Sequence[Planned]:
        k = self.recipe.at_once
        return self.rows[number * k : (number + 1) * k]

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that change with anything a row depends on."""
        facts = [asdict(self.recipe), dict(self.source), [asdict(row) for row in self.rows]]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps({"digest": self.digest, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Inverse of ``to_json``. Raises ``ValueError``, ``KeyError`` or ``TypeError`` for other texts."""
        data = json.loads(text)
        recipe = Recipe(**{**data["recipe"], "templates": tuple(data["recipe"]["templates"])})
        rows = tuple(Planned(**{**row, "photos": tuple(map(_photo, row["photos"]))}) for row in data["rows"])
        return cls(recipe, data["source"], rows, tuple(data["skipped"]), tuple(data["remarks"]), data["notes"])


def write_plan(plan: Plan, folder: Path) -> None:
    """``folder/plan.json``; does nothing if the same plan is there. Raises ``BadRequest`` if another one is."""
    if (folder / FILE).exists():
        if read_plan(folder).digest == plan.digest:
            return
        raise BadRequest(f"{str(folder)!r} holds another plan: run that one, or choose another folder")
    write_bytes(plan.to_json().encode(), folder / FILE)


def read_plan(folder: Path) -> Plan:
    """Raises ``BadRequest`` for a folder without a plan or with a damaged one."""
    file = folder / FILE
    if not file.is_file():
        raise BadRequest(f"{str(folder)!r} holds no plan.json: make one first, data-builder plan SOURCE -o {folder}")
    try:
        return Plan.from_json(file.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRequest(f"{str(file)!r} is no plan ({' '.join(str(error).split())[:100]}): make it again") from error


def printable(text: str) -> str:
    """``text`` without the bytes that are no UTF-8, which names of files may hold."""
    return text.encode("utf-8", "replace").decode()


def seed_of(recipe_seed: int, subject: str, view: int) -> int:
    """A subject's own seed, whatever its place in the list."""
    digest = hashlib.sha256(f"{recipe_seed}/{subject}/{view}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big")
