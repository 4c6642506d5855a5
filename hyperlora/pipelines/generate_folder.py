"""A folder of subjects to LoRA files and an index; a killed run resumes where it stopped."""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Final, TextIO

from PIL import Image

from hyperlora.data.batching import split_batches
from hyperlora.data.images import read_image
from hyperlora.data.subjects import (
    SkippedPhoto,
    Subject,
    list_subjects,
    summarize_skipped_photos,
)
from hyperlora.diffusion.diffusion_base import DiffusionBase
from hyperlora.errors import HyperloraError, InvalidImageError
from hyperlora.lora.io.negative_lora import NEGATIVE_SUFFIX, make_negative_path
from hyperlora.lora.weights import LoraWeights
from hyperlora.paths import find_path
from hyperlora.pipelines.config import GenerationConfig
from hyperlora.pipelines.generate import (
    GenerationRecord,
    generate_loras,
    generate_negatives,
)
from hyperlora.pipelines.lora_files import LoraFiles, serialize_lora_files
from hyperlora.pipelines.photo_model import AnyPhotoModel, SubjectPhotos
from hyperlora.pipelines.rerank import IdentityReranker
from hyperlora.progress import track

FileResult = tuple[GenerationRecord, LoraFiles]
"""A record of the index and the content of its files; no bytes where there is no file."""
BatchGenerator = Callable[[Sequence[Sequence[Subject]]], Iterable[Sequence[FileResult]]]
"""Generates batches of subjects, in order: the results of each batch."""
INDEX_NAME: Final = "index.jsonl"
"""The index in the output folder, one ``GenerationRecord`` per line."""
_MAX_STEM_BYTES: Final = 150


@dataclass(frozen=True)
class _LoadedSubject:
    """A subject with those of its photos that could be read."""

    name: str
    photo_paths: Sequence[Path]
    pixels: SubjectPhotos


def generate_folder(
    model: AnyPhotoModel,
    folder: Path,
    output_dir: Path,
    config: GenerationConfig,
    base: DiffusionBase | None = None,
    batch_size: int = 32,
    batch_generator: BatchGenerator | None = None,
    reranker: IdentityReranker | None = None,
) -> list[GenerationRecord]:
    """Write one LoRA file per subject of a folder, and ``index.jsonl``.

    A photo that is not read is recorded and skipped; its subject uses the others. Subjects without
    any, such as empty folders, are recorded and skipped too. A subject in the index is skipped if
    its file exists and is of this model, these settings and as many photos.

    Args:
        model: The model.
        folder: The subjects; see ``list_subjects``.
        output_dir: The folder to write, created if missing.
        config: The settings, of one LoRA per subject.
        base: The base, for refinement.
        batch_size: Subjects per batch.
        batch_generator: Generates the batches, e.g. on a cluster (``make_ray_batch_generator``);
            None for this process.
        reranker: Ranks the candidates if ``num_candidates`` is more than 1.

    Returns:
        The records of the index.

    Raises:
        InvalidImageError: The folder holds no subject.
        InvalidArgumentError: The settings do not suit a folder or the model.
    """
    config.check_folder()
    folder = find_path(Path(folder))
    skipped_photos: list[SkippedPhoto] = []
    skip_reasons: list[str] = []
    subjects = list_subjects(folder, skip_reasons, skipped_photos=skipped_photos)
    output_dir.mkdir(parents=True, exist_ok=True)
    index_path, config_hash = output_dir / INDEX_NAME, _compute_config_hash(model, config)
    previous_records = {
        record.subject: record
        for record in _read_index(index_path)
        if record.file
        and all(
            (output_dir / name).is_file() for name in (record.file, record.negative_file) if name
        )
    }
    pending_subjects = [
        subject
        for subject in subjects
        if not _is_up_to_date(previous_records.get(subject.name), subject, config_hash)
    ]
    pending_names = {subject.name for subject in pending_subjects}
    records = [record for name, record in previous_records.items() if name not in pending_names]
    photo_reasons = summarize_skipped_photos(skipped_photos, folder)
    subject_reasons = [reason for reason in skip_reasons if reason not in photo_reasons]
    records += [_make_failure("", 0, reason)[0] for reason in subject_reasons]
    records += [_make_skip_record(photo, folder) for photo in skipped_photos]
    temp_index_path = index_path.with_suffix(".tmp")
    with temp_index_path.open("w") as index_file:
        _write_records(index_file, records)
        # the old index stands until the new one is whole; lines are added to the new one below
        os.replace(temp_index_path, index_path)
        batches = list(split_batches(pending_subjects, batch_size))
        if batch_generator is not None:
            batch_results = batch_generator(batches)
        else:
            batch_results = (generate_batch(model, b, config, base, reranker) for b in batches)
        num_pending = len(pending_subjects)
        for results in track(batch_results, "LoRAs", "LoRAs", num_pending, batch_size):
            new_records = _write_files(results, output_dir, config_hash)
            _write_records(index_file, new_records)
            records += new_records
    return records


def _write_files(
    results: Sequence[FileResult], output_dir: Path, config_hash: str
) -> list[GenerationRecord]:
    """Write the files of a batch; return its records, those of files with the hash."""
    for record, files in results:
        if record.file:
            files.write(output_dir / record.file)
    return [
        replace(record, config_hash=config_hash) if record.file else record for record, _ in results
    ]


def generate_batch(
    model: AnyPhotoModel,
    subjects: Sequence[Subject],
    config: GenerationConfig,
    base: DiffusionBase | None = None,
    reranker: IdentityReranker | None = None,
) -> list[FileResult]:
    """Generate the files of some subjects; those with equally many photos share a forward pass.

    Args:
        model: The model.
        subjects: The subjects.
        config: The settings, of one LoRA per subject.
        base: The base, for refinement.
        reranker: Ranks the candidates if ``num_candidates`` is more than 1.

    Returns:
        Records of skipped photos and of files, each with the content of its file.

    Raises:
        InvalidArgumentError: The settings do not suit the model.
    """
    start_time = time.perf_counter()
    pixel_base = base or (reranker.base if reranker else None)
    results: list[FileResult] = []
    loaded_subjects: list[_LoadedSubject] = []
    for subject in subjects:
        paths, images, problems = _read_photos(subject)
        results += [_make_failure(subject.name, 0, problem) for problem in problems]
        if paths:
            pixels = SubjectPhotos.from_images(images, model, pixel_base)
            loaded_subjects.append(_LoadedSubject(subject.name, paths, pixels))
    loaded_subjects.sort(key=_count_photos)
    for _, group in groupby(loaded_subjects, key=_count_photos):
        for record, files in _generate_members(model, list(group), config, base, reranker):
            if record.file:
                seconds = (time.perf_counter() - start_time) / len(subjects)
                record = replace(record, seconds=seconds)
            results.append((record, files))
    return results


def _generate_members(
    model: AnyPhotoModel,
    members: list[_LoadedSubject],
    config: GenerationConfig,
    base: DiffusionBase | None,
    reranker: IdentityReranker | None,
) -> list[FileResult]:
    """Generate the files of subjects with equally many photos.

    If the model refuses the photos of one of them, e.g. without a face, each runs alone.
    """
    photos = [member.pixels for member in members]
    try:
        features = model.encode_subjects(photos)
    except InvalidImageError as error:
        if len(members) == 1:
            name = members[0].name
            return [_make_failure(name, len(members[0].photo_paths), f"{name!r}: {error}")]
        groups = (_generate_members(model, [m], config, base, reranker) for m in members)
        return [result for group in groups for result in group]
    warnings = model.list_warnings(features)
    weights = generate_loras(model, photos, config, base, features, reranker)
    negatives = generate_negatives(model, features, config)
    results = []
    for i, member in enumerate(members):
        negative = None if negatives is None else negatives[i]
        record, files = _serialize_member(model, member, weights[i], negative, config)
        results.append((replace(record, warnings=warnings[i]), files))
    return results


def _serialize_member(
    model: AnyPhotoModel,
    member: _LoadedSubject,
    weights: LoraWeights,
    negative: LoraWeights | None,
    config: GenerationConfig,
) -> FileResult:
    """Serialize one subject's LoRA; a LoRA that cannot be written does not end the folder."""
    num_photos = len(member.photo_paths)
    names = (member.name, "")
    try:
        files = serialize_lora_files(
            model, weights, negative, member.photo_paths, names, config.format
        )
    except HyperloraError as error:  # e.g. weights that are NaN
        return _make_failure(member.name, num_photos, f"{member.name!r}: {error}")
    file_name = f"{make_file_stem(member.name, negative is not None)}.safetensors"
    negative_name = None if negative is None else make_negative_path(Path(file_name)).name
    record = GenerationRecord(member.name, file_name, num_photos, 0.0, negative_file=negative_name)
    return record, files


def _make_failure(subject_name: str, num_photos: int, error: str) -> FileResult:
    return GenerationRecord(subject_name, None, num_photos, 0.0, error), LoraFiles()


def _make_skip_record(photo: SkippedPhoto, folder: Path) -> GenerationRecord:
    parts = photo.path.relative_to(folder).parts
    subject_name = parts[0] if len(parts) > 1 else photo.path.stem
    return _make_failure(subject_name, 0, str(photo))[0]


def _count_photos(subject: _LoadedSubject) -> int:
    return len(subject.photo_paths)


def make_file_stem(subject_name: str, has_negative: bool = False) -> str:
    """Return a name that every file system takes.

    Args:
        subject_name: The name of a subject.
        has_negative: Whether every subject has a second file, ``NAME-negative.safetensors``.

    Returns:
        The name itself if possible; otherwise its usable characters and 8 digits of its hash, so
        that two names never meet, nor a name and another's second file.
    """
    safe_name = re.sub(r"[^\w. -]|^-", "_", subject_name).encode()[:_MAX_STEM_BYTES]
    stem = safe_name.decode(errors="ignore").strip(" .")
    is_second_name = has_negative and stem.lower().endswith(NEGATIVE_SUFFIX)
    if stem == subject_name and not is_second_name:
        return subject_name
    name_hash = hashlib.sha256(subject_name.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{stem}-{name_hash[:8]}"


def _read_photos(subject: Subject) -> tuple[list[Path], list[Image.Image], list[str]]:
    """Read the photos of a subject: paths and images of the good ones, reasons of the others."""
    paths, images, problems = [], [], []
    for photo in subject.photos:
        try:
            images.append(read_image(photo))
            paths.append(photo)
        except InvalidImageError as error:
            problems.append(str(error))
    return paths, images, problems


def _compute_config_hash(model: AnyPhotoModel, config: GenerationConfig) -> str:
    """Compute a hash of the model's layout and weights and of the settings."""
    hasher = hashlib.sha256(f"{model.layout.fingerprint} {config}".encode())
    hasher.update(model.compute_fingerprint().encode())
    return hasher.hexdigest()[:16]


def _is_up_to_date(record: GenerationRecord | None, subject: Subject, config_hash: str) -> bool:
    """Check whether a record is of these settings and of as many photos as there are now."""
    if record is None:
        return False
    return record.config_hash == config_hash and record.num_photos == len(subject.photos)


def _read_index(index_path: Path) -> Iterator[GenerationRecord]:
    if not index_path.is_file():
        return
    for line in index_path.read_text("utf-8", errors="replace").splitlines():
        try:
            record = GenerationRecord(**json.loads(line))
        except (ValueError, TypeError, RecursionError):  # a killed run may leave half a line
            continue
        names = (record.subject, record.file or "", record.negative_file or "")
        if all(isinstance(value, str) for value in names) and isinstance(record.warnings, list):
            yield record


def _write_records(index_file: TextIO, records: list[GenerationRecord]) -> None:
    index_file.writelines(json.dumps(asdict(record)) + "\n" for record in records)
    index_file.flush()
    os.fsync(index_file.fileno())
