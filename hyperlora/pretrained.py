"""Folders of the bundled *avatars* models, the defaults of every command."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from hyperlora.errors import ModelLoadError

REPOSITORY_URL: Final = "https://github.com/hyperlora/hyperlora"
_PACKAGE_DIR: Final = Path(__file__).parent


def find_avatars_dir(package_dir: Path = _PACKAGE_DIR) -> Path:
    """Find the bundle: inside the package of a wheel, beside the package in a repository.

    Args:
        package_dir: Folder of the package ``hyperlora``.

    Returns:
        The folder; that of a wheel if there is neither.
    """
    parents = (package_dir, package_dir.parent)
    candidates = [parent / "checkpoints" / "avatars" for parent in parents]
    return next((folder for folder in candidates if folder.is_dir()), candidates[0])


AVATARS_DIR: Final = find_avatars_dir()
BASE_DIR: Final = AVATARS_DIR / "base"
IMAGE_TO_LORA_DIR: Final = AVATARS_DIR / "image-to-lora"
LORA_DIFFUSION_DIR: Final = AVATARS_DIR / "lora-diffusion"
MODEL_DIR_BY_METHOD: Final[Mapping[str, Path]] = {
    "hypernetwork": IMAGE_TO_LORA_DIR,
    "lora-diffusion": LORA_DIFFUSION_DIR,
}
"""Folder by the value of ``--method``."""
EDIT_BASE_DIR: Final = AVATARS_DIR / "edit-base"
PAIR_TO_LORA_DIR: Final = AVATARS_DIR / "pair-to-lora"
FACE_PACK_DIR: Final = AVATARS_DIR / "face-pack"
"""For trainings: the repository has it, the wheel does not."""
EVALUATOR_DIR: Final = AVATARS_DIR / "evaluator"
BENCHMARK_DIR: Final = AVATARS_DIR / "test"
EDIT_BENCHMARK_DIR: Final = AVATARS_DIR / "test-edits"


def check_bundle(name_or_path: str | Path) -> None:
    """Check that a folder of the bundle is there; other folders and hub ids pass.

    Args:
        name_or_path: The folder or the hub id that is about to be loaded.

    Raises:
        ModelLoadError: It is a folder of the bundle, and this installation lacks it.
    """
    folder = Path(name_or_path)
    if folder.is_relative_to(AVATARS_DIR) and not folder.is_dir():
        raise ModelLoadError(
            f"this installation lacks the bundled {folder.name!r}, expected in {folder.parent}: "
            f"install the wheel of hyperlora again, or clone {REPOSITORY_URL}"
        )
