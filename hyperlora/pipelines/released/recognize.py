"""The kind of a released network by its list of files and the headers of its tensors."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from hyperlora.errors import ModelLoadError
from hyperlora.pipelines.released.cards import ReleasedKind
from hyperlora.pipelines.released.hub_files import ReleasedFiles
from hyperlora.pipelines.released.tensor_headers import TensorHeader

HYPERLORA_INDEX: Final = "hyper_lora_modules.json"
HYPERLORA_FILES: Final = (
    HYPERLORA_INDEX,
    "hyper_lora_modules.safetensors",
    "resampler.safetensors",
    "id_projector.safetensors",
)
TEMPLATE_FILE: Final = "model.py"
I2L_DIGESTS: Final = {
    "9510cb8c": "z-image",
    "0aad5146": "style",
    "a166c334": "coarse",
    "a5476e69": "fine",
}
"""The first digits of ``TensorHeader.digest`` of the released files of i2L v1."""
_I2L_PATTERN: Final = re.compile(
    r"(\w+_lora\.)?blocks\.\d+\.layers\.\d+\.proj_[ab]\.proj_in\.weight", re.ASCII
)
_MAX_HEADERS: Final = 32
"""Files whose headers are read before a repository counts as unknown."""


@dataclass(frozen=True)
class Recognition:
    """What a repository holds.

    Attributes:
        kind: How the network is built.
        variant: The chosen variant; empty for a network without any.
        variants: All variants of the repository.
        files: The paths of the network's files; encoders are elsewhere.
    """

    kind: ReleasedKind
    variant: str
    variants: tuple[str, ...]
    files: tuple[str, ...]


def recognize(files: ReleasedFiles) -> Recognition:
    """Recognize a released network; nothing but headers is read.

    Args:
        files: The repository, with the variant that the user asks for.

    Returns:
        Kind, variant and files.

    Raises:
        ModelLoadError: The kind is unknown, the variant is missing, or files are.
    """
    names = [path for path in files.sizes if PurePosixPath(path).name == HYPERLORA_INDEX]
    if names or any(PurePosixPath(path).name in HYPERLORA_FILES for path in files.sizes):
        return _recognize_hyperlora(files, names)
    if TEMPLATE_FILE in files.sizes:
        weights = tuple(path for path in files.sizes if path.endswith(".safetensors"))
        return Recognition("template", "", (), (TEMPLATE_FILE, *weights))
    by_variant: dict[str, tuple[ReleasedKind, str]] = {}
    for path in [p for p in files.sizes if p.endswith(".safetensors")][:_MAX_HEADERS]:
        if (kind := recognize_header(files.read_header(path))) is not None:
            by_variant[_name_variant(path, kind, files.read_header(path))] = (kind, path)
    if not by_variant:
        raise ModelLoadError(
            f"{files.name!r} holds no network from photos to LoRAs that is known: HyperLoRA, i2L, "
            "a template with model.py, LoRWeB, or a model of hyperlora itself"
        )
    variant = _choose_variant(files, tuple(by_variant))
    kind, path = by_variant[variant]
    return Recognition(kind, variant, tuple(by_variant), (path,))


def recognize_header(header: TensorHeader) -> ReleasedKind | None:
    """Tell the kind of a network by the names of its tensors.

    Args:
        header: The header of one safetensors file.

    Returns:
        The kind; None for anything else.
    """
    if header.digest[:8] in I2L_DIGESTS:
        return "i2l-v1"
    if any("lora_keys" in name.split(".") for name in header.tensors):
        return "lorweb"
    return "i2l-v1" if any(map(_I2L_PATTERN.fullmatch, header.tensors)) else None


def _recognize_hyperlora(files: ReleasedFiles, indices: Sequence[str]) -> Recognition:
    """Find the folder of the chosen variant and check that it is whole."""
    folders = {PurePosixPath(path).parent for path in indices} or {
        PurePosixPath(path).parent
        for path in files.sizes
        if PurePosixPath(path).name in HYPERLORA_FILES
    }
    by_variant = {_name_folder(folder, files): folder for folder in sorted(folders)}
    variant = _choose_variant(files, tuple(by_variant))
    folder = by_variant[variant]
    paths = tuple(str(folder / name) for name in HYPERLORA_FILES)
    if missing := [path for path in paths if path not in files.sizes]:
        raise ModelLoadError(
            f"{files.name!r} is half fetched: {', '.join(missing)} missing; fetch the whole folder"
        )
    return Recognition("hyperlora-sdxl", variant, tuple(by_variant), paths)


def _name_folder(folder: PurePosixPath, files: ReleasedFiles) -> str:
    """``fidelity`` of ``sdxl_hyper_id_lora_v1_fidelity``; of the folder itself at the top."""
    name = folder.name or PurePosixPath(files.name.replace("\\", "/")).name
    return name.rpartition("_")[2].lower()


def _name_variant(path: str, kind: ReleasedKind, header: TensorHeader) -> str:
    """The variant by the digest, or by the end of the file's name."""
    if kind != "i2l-v1":
        return ""
    if known := I2L_DIGESTS.get(header.digest[:8]):
        return known
    if any(name.startswith("layers_lora.") for name in header.tensors):
        return "z-image"
    return PurePosixPath(path).stem.rpartition("-")[2].lower()


def _choose_variant(files: ReleasedFiles, variants: tuple[str, ...]) -> str:
    """Choose the variant that the user asks for; the first of the table by default."""
    if not files.variant:
        return next((name for name in _PREFERRED_VARIANTS if name in variants), variants[0])
    if files.variant.lower() in variants:
        return files.variant.lower()
    known = ", ".join(filter(None, variants)) or "none"
    raise ModelLoadError(f"{files.name!r} has no variant {files.variant!r}; it has: {known}")


_PREFERRED_VARIANTS: Final = ("fidelity", "style")
