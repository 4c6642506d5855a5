"""Photos to LoRA files: one subject, or a folder of them offline."""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Literal, TextIO

import torch
from PIL import Image
from torch import Tensor

from hyperlora.data import Subject, read_image, sha256_of, subjects_in, to_tensor
from hyperlora.errors import BadImage, BadRequest, HyperloraError
from hyperlora.features import ImageFeatures
from hyperlora.formats import LoraHeader, lora_bytes, save_lora
from hyperlora.formats.tensors import write_bytes
from hyperlora.lora import LoraWeights
from hyperlora.pipelines.bases import Base
from hyperlora.pipelines.doubts import unknown
from hyperlora.pipelines.image_to_lora import ImageToLora
from hyperlora.pipelines.refining import refine
from hyperlora.progress import track

LoraFormat = Literal["diffusers", "kohya", "sgm"]


@dataclass(frozen=True)
class Settings:
    """How LoRAs are made and written. ``rank`` None keeps the model's; ``refine`` counts fine-tuning steps, which need
    a ``base``."""

    format: LoraFormat = "diffusers"
    rank: int | None = None
    strength: float = 1.0
    refine: int = 0


@dataclass(frozen=True)
class Photos:
    """One subject's photos, decoded once: ``seen`` [views, 3, size, size] by the encoder and, for refining, ``fitted``
    [views, 3, resolution, resolution] as the base would draw them."""

    seen: Tensor
    fitted: Tensor | None = None

    @classmethod
    def of(cls, images: Sequence[Image.Image], model: ImageToLora, base: Base | None = None) -> "Photos":
        seen = torch.stack([to_tensor(image, model.encoder.image_size) for image in images])
        return cls(seen, torch.stack([to_tensor(image, base.resolution) for image in images]) if base else None)

    @classmethod
    def joined(cls, parts: Sequence["Photos"]) -> "Photos":
        """Photos of one subject that were decoded apart."""
        fitted = [part.fitted for part in parts if part.fitted is not None]
        return cls(torch.cat([part.seen for part in parts]), torch.cat(fitted) if fitted else None)


@dataclass(frozen=True)
class Made:
    """One line of the index: the subject, its file, or why there is none; ``recipe`` tells model and settings apart,
    ``notices`` say what may be wrong with the photos."""

    subject: str
    file: str | None
    photos: int
    seconds: float
    error: str | None = None
    recipe: str = ""
    notices: Sequence[str] = field(default_factory=list)


def generate(
    model: ImageToLora,
    subjects: Sequence[Photos],
    settings: Settings,
    base: Base | None = None,
    features: ImageFeatures | None = None,
) -> LoraWeights:
    """LoRAs (batch axis) of subjects with equally many photos each, refined and resized as asked; ``features`` are
    those of their photos where the encoder has seen them already.

    Raises ``BadRequest`` for refining without a base, and for a rank that no site can fill.
    """
    check(model, settings)
    weights = predicted(model, features or features_of(model, subjects))
    return finished(model, weights, subjects, settings, base)


def check(model: ImageToLora, settings: Settings) -> None:
    """Raises ``BadRequest`` for a rank that no site can fill."""
    rank = settings.rank or model.layout.rank
    if rank > (widest := max(min(site.fan_in, site.fan_out) for site in model.layout.sites)):
        raise BadRequest(f"rank {rank} asked for, but no weight of {model.layout.base!r} has more than {widest}")


def features_of(model: ImageToLora, subjects: Sequence[Photos]) -> ImageFeatures:
    """What the encoder says about subjects with equally many photos each."""
    return model.features(torch.stack([photos.seen for photos in subjects]).to(model.device))


@torch.no_grad()
def predicted(model: ImageToLora, features: ImageFeatures) -> LoraWeights:
    """The one forward pass, after the encoder: LoRAs (batch axis)."""
    return model.made(features)


def finished(
    model: ImageToLora,
    weights: LoraWeights,
    subjects: Sequence[Photos],
    settings: Settings,
    base: Base | None = None,
    watch: Callable[[int], None] | None = None,
) -> LoraWeights:
    """Predicted LoRAs refined, resized and scaled as asked; ``watch`` is told every step of refining.

    Raises ``BadRequest`` for refining without a base.
    """
    rank = settings.rank or model.layout.rank
    if settings.refine:
        if base is None:
            raise BadRequest("refining draws with the base model: give it too")
        targets = torch.stack([photos.fitted for photos in subjects if photos.fitted is not None])
        weights = refine(
            base, weights, targets.to(model.device), steps=settings.refine, out_rank=rank, watch=watch,
            label=None if watch else "refining", prompt=f"a portrait of {_trigger(model)}",
        )  # fmt: skip
    elif rank != weights.layout.rank:
        weights = weights.resize(rank)
    return weights * settings.strength if settings.strength != 1 else weights


def header_of(model: ImageToLora, title: str, photos: Sequence[Path | bytes]) -> LoraHeader:
    """Provenance of a generated LoRA."""
    card = model.card
    resolution = card.get("resolution")
    return LoraHeader(
        title=title.encode("utf-8", "replace").decode(),  # file names may hold bytes that are no text
        architecture=card.get("architecture", "stable-diffusion-v1"),
        resolution=(resolution, resolution) if resolution else None,
        trigger_phrase=_trigger(model),
        license=card.get("license", ""),
        encoder=str(model.encoder.config["name"]),
        encoder_license=model.encoder.licence,
        reference_sha256=tuple(sha256_of(p) for p in photos),
    )


def generate_file(
    model: ImageToLora,
    photos: Sequence[Path],
    out: Path,
    settings: Settings,
    base: Base | None = None,
    opened: Sequence[Image.Image] | None = None,
) -> Made:
    """One subject's LoRA file; ``opened`` are the photos where they have been read already. Nothing is written if
    anything fails."""
    began = time.perf_counter()
    images = opened if opened is not None else [read_image(p) for p in photos]
    subject = [Photos.of(images, model, base)]
    features = features_of(model, subject)
    weights = generate(model, subject, settings, base, features)[0]
    save_lora(weights, out, format=settings.format, header=header_of(model, out.stem, photos))
    (notices,) = unknown(model.domain, features)
    return Made(out.stem, out.name, len(photos), time.perf_counter() - began, notices=notices)


Maker = Callable[[Sequence[list[Subject]]], Iterable[list[tuple[Made, bytes]]]]
"""Batches of subjects to what was made of each: an index line, and the file's bytes where there is one."""


def generate_folder(
    model: ImageToLora,
    folder: Path,
    out: Path,
    settings: Settings,
    base: Base | None = None,
    batch_size: int = 32,
    maker: Maker | None = None,
) -> list[Made]:
    """One LoRA file per subject of ``folder`` (see ``subjects_in``) and ``index.jsonl`` beside them.

    A photo that cannot be read is reported in the index and skipped, its subject made from the others. Subjects in the
    index are not made again if their file is there, of this model and these settings, and of as many photos as now.
    ``maker`` makes the batches (``ray_batches.on_ray``), in this process unless given; files are written here.
    """
    maker = maker or (lambda batches: (make_batch(model, batch, settings, base) for batch in batches))
    subjects = subjects_in(folder)
    out.mkdir(parents=True, exist_ok=True)
    index, recipe = out / "index.jsonl", _recipe(model, settings)
    earlier = {made.subject: made for made in _read(index) if made.file and (out / made.file).is_file()}
    waiting = [s for s in subjects if not _is_done(earlier.get(s.name), s, recipe)]
    made = [old for name, old in earlier.items() if name not in {s.name for s in waiting}]
    fresh_index = index.with_suffix(".tmp")
    with fresh_index.open("w") as lines:
        _write(lines, made)
        os.replace(fresh_index, index)  # the old index stands until the new one is whole; lines are added to it below
        batches = [waiting[i : i + batch_size] for i in range(0, len(waiting), batch_size)]
        for results in track(maker(batches), "LoRAs", "LoRAs", len(waiting), batch_size):
            fresh = []
            for item, data in results:
                if item.file:
                    write_bytes(data, out / item.file)
                fresh.append(replace(item, recipe=recipe if item.file else ""))
            _write(lines, fresh)
            made += fresh
    return made


def make_batch(
    model: ImageToLora, batch: Sequence[Subject], settings: Settings, base: Base | None = None
) -> list[tuple[Made, bytes]]:
    """What ``generate_folder`` writes of some subjects: index lines, each with its file's bytes (or none)."""
    began = time.perf_counter()
    made: list[tuple[Made, bytes]] = []
    good: list[tuple[Subject, list[Path], Photos]] = []
    for subject in batch:
        paths, images, problems = _readable(subject)
        made += [(Made(subject.name, None, 0, 0.0, problem), b"") for problem in problems]
        if paths:
            good.append((subject, paths, Photos.of(images, model, base)))
    for _, group in groupby(sorted(good, key=lambda g: len(g[1])), key=lambda g: len(g[1])):
        members = list(group)
        together = [photos for _, _, photos in members]
        features = features_of(model, together)
        notices = unknown(model.domain, features)
        weights = generate(model, together, settings, base, features)
        for i, (subject, paths, _) in enumerate(members):
            header = header_of(model, subject.name, paths)
            try:
                data = lora_bytes(weights[i], format=settings.format, header=header)
            except HyperloraError as error:  # e.g. a LoRA of NaN: one subject's trouble, not the folder's
                made.append((Made(subject.name, None, len(paths), 0.0, f"{subject.name!r}: {error}"), b""))
                continue
            seconds = (time.perf_counter() - began) / len(batch)
            file = f"{file_stem(subject.name)}.safetensors"
            made.append((Made(subject.name, file, len(paths), seconds, notices=notices[i]), data))
    return made


def file_stem(subject: str) -> str:
    """``subject`` where every file system takes it as a name, otherwise what it takes and 8 digits to tell it apart."""
    safe = re.sub(r"[^\w. -]|^-", "_", subject).encode()[:150].decode(errors="ignore").strip(" .")
    if safe == subject:
        return subject
    return f"{safe}-{hashlib.sha256(subject.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def _readable(subject: Subject) -> tuple[list[Path], list[Image.Image], list[str]]:
    paths, images, problems = [], [], []
    for photo in subject.photos:
        try:
            images.append(read_image(photo))
            paths.append(photo)
        except BadImage as error:
            problems.append(str(error))
    return paths, images, problems


def _trigger(model: ImageToLora) -> str:
    return str(model.card.get("trigger_phrase", "sks person"))


def _recipe(model: ImageToLora, settings: Settings) -> str:
    digest = hashlib.sha256(f"{model.layout.fingerprint} {settings}".encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _is_done(made: Made | None, subject: Subject, recipe: str) -> bool:
    return made is not None and (made.recipe, made.photos) == (recipe, len(subject.photos))


def _read(index: Path) -> Iterator[Made]:
    if index.is_file():
        for line in index.read_text().splitlines():
            try:
                yield Made(**json.loads(line))
            except (ValueError, TypeError):  # a killed run may leave half a line
                continue


def _write(lines: TextIO, made: list[Made]) -> None:
    lines.writelines(json.dumps(asdict(item)) + "\n" for item in made)
    lines.flush()
    os.fsync(lines.fileno())
