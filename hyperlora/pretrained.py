"""Folders of the bundled *avatars* models, the defaults of every command."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

AVATARS_DIR: Final = Path(__file__).parents[1] / "checkpoints" / "avatars"
BASE_DIR: Final = AVATARS_DIR / "base"
IMAGE_TO_LORA_DIR: Final = AVATARS_DIR / "image-to-lora"
DIFFLORA_DIR: Final = AVATARS_DIR / "difflora"
MODEL_DIR_BY_METHOD: Final[Mapping[str, Path]] = {
    "hypernetwork": IMAGE_TO_LORA_DIR,
    "difflora": DIFFLORA_DIR,
}
"""Folder by the value of ``--method``."""
EDIT_BASE_DIR: Final = AVATARS_DIR / "edit-base"
PAIR_TO_LORA_DIR: Final = AVATARS_DIR / "pair-to-lora"
FACE_PACK_DIR: Final = AVATARS_DIR / "face-pack"
EVALUATOR_DIR: Final = AVATARS_DIR / "evaluator"
BENCHMARK_DIR: Final = AVATARS_DIR / "test"
EDIT_BENCHMARK_DIR: Final = AVATARS_DIR / "test-edits"
