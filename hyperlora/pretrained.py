"""Where the embedded *avatars* bundle lies: the models every verb uses unless told otherwise."""

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
"""By the method's name, as ``--method`` takes it."""
EDIT_BASE_DIR: Final = AVATARS_DIR / "edit-base"
PAIR_TO_LORA_DIR: Final = AVATARS_DIR / "pair-to-lora"
FACE_PACK_DIR: Final = AVATARS_DIR / "face-pack"
EVALUATOR_DIR: Final = AVATARS_DIR / "evaluator"
BENCHMARK_DIR: Final = AVATARS_DIR / "test"
EDIT_BENCHMARK_DIR: Final = AVATARS_DIR / "test-edits"
