"""A folder of subjects to LoRA files and an index, offline; a run that was killed goes on where it stopped."""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import TextIO

import torch
from PIL import Image

from hyperlora.data.images import read_image
from hyperlora.data.subjects import Subject, subjects_in
from hyperlora.diffusion.diffusion_base import Base
from hyperlora.errors import BadImage, HyperloraError
from hyperlora.lora.io.safetensors_file import write_bytes
from hyperlora.lora.io.save import lora_bytes
from hyperlora.pipelines.generate import Made, Photos, Settings, features_of, generate, header_of
from hyperlora.pipelines.image_to_lora_base import PhotoModel
from hyperlora.pipelines.input_checks import unknown
from hyperlora.pipelines.rerank import Chooser
from hyperlora.progress import track

Maker = Callable[[Sequence[list[Subject]]], Iterable[list[tuple[Made, bytes]]]]
"""Batches of subjects to what was made of each: an index line, and the file's bytes where there is one."""


def generate_folder(
    model: PhotoModel,
    folder: Path,
    out: Path,
    settings: Settings,
    base: Base | None = None,
    batch_size: int = 32,
    maker: Maker | None = None,
    chooser: Chooser | None = None,
) -> list[Made]:
    """One LoRA file per subject of ``folder`` (see ``subjects_in``) and ``index.jsonl`` beside them.

    A photo that cannot be read is reported in the index and skipped, its subject made from the others. Subjects in the
    index are not made again if their file is there, of this model and these settings, and of as many photos as now.
    ``maker`` makes the batches (``ray_batches.on_ray``), in this process unless given; files are written here.
    ``chooser`` is asked where the settings say best of several.
    """
    maker = maker or (lambda batches: (make_batch(model, batch, settings, base, chooser) for batch in batches))
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
    model: PhotoModel, batch: Sequence[Subject], settings: Settings, base: Base | None = None,
    chooser: Chooser | None = None,
) -> list[tuple[Made, bytes]]:  # fmt: skip
    """What ``generate_folder`` writes of some subjects: index lines, each with its file's bytes (or none)."""
    began = time.perf_counter()
    made: list[tuple[Made, bytes]] = []
    good: list[tuple[Subject, list[Path], Photos]] = []
    for subject in batch:
        paths, images, problems = _readable(subject)
        made += [(Made(subject.name, None, 0, 0.0, problem), b"") for problem in problems]
        if paths:
            good.append((subject, paths, Photos.of(images, model, base or (chooser.base if chooser else None))))
    for _, group in groupby(sorted(good, key=lambda g: len(g[1])), key=lambda g: len(g[1])):
        members = list(group)
        together = [photos for _, _, photos in members]
        features = features_of(model, together)
        notices = unknown(model.domain, model.image_features(features))
        weights = generate(model, together, settings, base, features, chooser)
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


def _recipe(model: PhotoModel, settings: Settings) -> str:
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
