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
from hyperlora.data.subjects import Subject, list_subjects
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.errors import HyperloraError, InvalidImageError
from hyperlora.lora.io.safetensors_file import write_bytes
from hyperlora.lora.io.save import serialize_lora
from hyperlora.pipelines.generate import (
    GenerationConfig,
    GenerationRecord,
    SubjectPhotos,
    encode_subjects,
    generate_loras,
    make_metadata,
)
from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase
from hyperlora.pipelines.input_checks import check_photos
from hyperlora.pipelines.rerank import IdentityReranker
from hyperlora.progress import track

BatchGenerator = Callable[[Sequence[list[Subject]]], Iterable[list[tuple[GenerationRecord, bytes]]]]
"""Batches of subjects to what was made of each: an index line, and the file's bytes where there is one."""


def generate_folder(
    model: ImageToLoraBase,
    folder: Path,
    output_dir: Path,
    config: GenerationConfig,
    base: DiffusionBase | None = None,
    batch_size: int = 32,
    batch_generator: BatchGenerator | None = None,
    reranker: IdentityReranker | None = None,
) -> list[GenerationRecord]:
    """One LoRA file per subject of ``folder`` (see ``list_subjects``) and ``index_path.jsonl`` beside them.

    A photo that cannot be read is reported in the index and skipped, its subject made from the others. Subjects in the
    index are not made again if their file is there, of this model and these settings, and of as many photos as now.
    ``batch_generator`` makes the batches (``ray_batches.make_ray_batch_generator``), in this process unless given; files are written here.
    ``reranker`` is asked where the settings say best of several.
    """
    batch_generator = batch_generator or (
        lambda batches: (generate_batch(model, batch, config, base, reranker) for batch in batches)
    )
    subjects = list_subjects(folder)
    output_dir.mkdir(parents=True, exist_ok=True)
    index_path, config_hash = output_dir / "index.jsonl", _compute_config_hash(model, config)
    previous_records = {
        records.subject: records
        for records in _read_index(index_path)
        if records.file and (output_dir / records.file).is_file()
    }
    pending_subjects = [
        subject
        for subject in subjects
        if not _is_up_to_date(previous_records.get(subject.name), subject, config_hash)
    ]
    records = [
        previous_record
        for name, previous_record in previous_records.items()
        if name not in {subject.name for subject in pending_subjects}
    ]
    temp_index_path = index_path.with_suffix(".tmp")
    with temp_index_path.open("w") as index_file:
        _write_records(index_file, records)
        os.replace(
            temp_index_path, index_path
        )  # the old index stands until the new one is whole; lines are added to it below
        batches = [
            pending_subjects[i : i + batch_size]
            for i in range(0, len(pending_subjects), batch_size)
        ]
        for results in track(
            batch_generator(batches), "LoRAs", "LoRAs", len(pending_subjects), batch_size
        ):
            new_records = []
            for record, file_bytes in results:
                if record.file:
                    write_bytes(file_bytes, output_dir / record.file)
                new_records.append(replace(record, recipe=config_hash if record.file else ""))
            _write_records(index_file, new_records)
            records += new_records
    return records


def generate_batch(
    model: ImageToLoraBase,
    subjects: Sequence[Subject],
    config: GenerationConfig,
    base: DiffusionBase | None = None,
    reranker: IdentityReranker | None = None,
) -> list[tuple[GenerationRecord, bytes]]:
    """What ``generate_folder`` writes of some subjects: index lines, each with its file's bytes (or none)."""
    start_time = time.perf_counter()
    results: list[tuple[GenerationRecord, bytes]] = []
    loaded_subjects: list[tuple[Subject, list[Path], SubjectPhotos]] = []
    for subject in subjects:
        paths, images, problems = _read_photos(subject)
        results += [
            (GenerationRecord(subject.name, None, 0, 0.0, problem), b"") for problem in problems
        ]
        if paths:
            loaded_subjects.append(
                (
                    subject,
                    paths,
                    SubjectPhotos.from_images(
                        images, model, base or (reranker.base if reranker else None)
                    ),
                )
            )
    for _, group in groupby(
        sorted(loaded_subjects, key=lambda entry: len(entry[1])), key=lambda entry: len(entry[1])
    ):
        members = list(group)
        subject_photos = [photos for _, _, photos in members]
        features = encode_subjects(model, subject_photos)
        warnings = check_photos(model.ood_detector, model.get_image_features(features))
        weights = generate_loras(model, subject_photos, config, base, features, reranker)
        for i, (subject, paths, _) in enumerate(members):
            metadata = make_metadata(model, subject.name, paths)
            try:
                file_bytes = serialize_lora(weights[i], format=config.format, metadata=metadata)
            except (
                HyperloraError
            ) as error:  # e.g. a LoRA of NaN: one subject's trouble, not the folder's
                results.append(
                    (
                        GenerationRecord(
                            subject.name, None, len(paths), 0.0, f"{subject.name!r}: {error}"
                        ),
                        b"",
                    )
                )
                continue
            seconds = (time.perf_counter() - start_time) / len(subjects)
            file_name = f"{make_file_stem(subject.name)}.safetensors"
            results.append(
                (
                    GenerationRecord(
                        subject.name, file_name, len(paths), seconds, warnings=warnings[i]
                    ),
                    file_bytes,
                )
            )
    return results


def make_file_stem(subject_name: str) -> str:
    """``subject_name`` where every file system takes it as a name, otherwise what it takes and 8 digits to tell it apart."""
    safe_name = (
        re.sub(r"[^\w. -]|^-", "_", subject_name).encode()[:150].decode(errors="ignore").strip(" .")
    )
    if safe_name == subject_name:
        return subject_name
    return f"{safe_name}-{hashlib.sha256(subject_name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def _read_photos(subject: Subject) -> tuple[list[Path], list[Image.Image], list[str]]:
    paths, images, problems = [], [], []
    for photo in subject.photos:
        try:
            images.append(read_image(photo))
            paths.append(photo)
        except InvalidImageError as error:
            problems.append(str(error))
    return paths, images, problems


def _compute_config_hash(model: ImageToLoraBase, config: GenerationConfig) -> str:
    hasher = hashlib.sha256(f"{model.layout.fingerprint} {config}".encode())
    for tensor in model.state_dict().values():
        hasher.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()[:16]


def _is_up_to_date(record: GenerationRecord | None, subject: Subject, config_hash: str) -> bool:
    return record is not None and (record.config_hash, record.num_photos) == (
        config_hash,
        len(subject.photos),
    )


def _read_index(index_path: Path) -> Iterator[GenerationRecord]:
    if index_path.is_file():
        for line in index_path.read_text().splitlines():
            try:
                yield GenerationRecord(**json.loads(line))
            except (ValueError, TypeError):  # a killed run may leave half a line
                continue


def _write_records(index_file: TextIO, records: list[GenerationRecord]) -> None:
    index_file.writelines(json.dumps(asdict(record)) + "\n" for record in records)
    index_file.flush()
    os.fsync(index_file.fileno())
