"""Where the embedded *avatars* bundle lies: the models every verb uses unless told otherwise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

AVATARS: Final = Path(__file__).parents[1] / "checkpoints" / "avatars"
BASE: Final = AVATARS / "base"
MODEL: Final = AVATARS / "image-to-lora"
DIFFLORA: Final = AVATARS / "difflora"
PHOTO_MODELS: Final[Mapping[str, Path]] = {"hyperdreambooth": MODEL, "difflora": DIFFLORA}
"""By the method's name, as ``--method`` takes it."""
EDIT_BASE: Final = AVATARS / "edit-base"
PAIR_MODEL: Final = AVATARS / "pair-to-lora"
FACE_PACK: Final = AVATARS / "face-pack"
EVALUATOR: Final = AVATARS / "evaluator"
BENCHMARK: Final = AVATARS / "test"
EDIT_BENCHMARK: Final = AVATARS / "test-edits"
