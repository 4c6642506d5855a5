"""Where the embedded *avatars* bundle lies: the models every verb uses unless told otherwise."""

from pathlib import Path
from typing import Final

AVATARS: Final = Path(__file__).parents[1] / "checkpoints" / "avatars"
BASE: Final = AVATARS / "base"
MODEL: Final = AVATARS / "image-to-lora"
EDIT_BASE: Final = AVATARS / "edit-base"
PAIR_MODEL: Final = AVATARS / "pair-to-lora"
EVALUATOR: Final = AVATARS / "evaluator"
BENCHMARK: Final = AVATARS / "test"
EDIT_BENCHMARK: Final = AVATARS / "test-edits"
