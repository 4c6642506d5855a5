"""The avatar benchmark: photos of people of one split, and prompts with known truth."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Final

from data_builder.avatars.captions import prompt
from data_builder.avatars.drawing import draw
from data_builder.avatars.people import SPLITS, Scene, hidden, identity, scene

SCENES: Final = (
    Scene("smiling", "open", "none", "hoodie", "red", "sky"),
    Scene("serious", "open", "sunglasses", "t-shirt", "black", "orange"),
    Scene("laughing", "happy", "none", "tuxedo", "white", "gray"),
    Scene("sad", "closed", "round glasses", "sweater", "green", "pink"),
    Scene("screaming", "surprised", "none", "overall", "blue", "white"),
    Scene("neutral", "winking", "eyepatch", "blazer", "purple", "green"),
    Scene("tongue out", "open", "none", "v-neck", "yellow", "purple"),
    Scene("grimacing", "side", "glasses", "spacesuit", "white", "blue"),
)
_ASKED: Final = ("expression", "eyes", "glasses", "garment", "garment_color", "background")


def write_benchmark(out: Path, split: str = "test", people: int = 64, photos: int = 8) -> None:
    """``out/subjects/NAME/K.png`` and ``out/prompts.json`` as ``hyperlora.evaluation.benchmark`` reads them."""
    for seed in SPLITS[split][:people]:
        folder = out / "subjects" / f"person-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(photos):
            plain = replace(scene(seed, k), hat="none", style="plain")
            draw(identity(seed), plain).save(folder / f"{k}.webp", lossless=True, method=6)
    prompts = [{"prompt": prompt(s), "truth": _truth(s)} for s in SCENES]
    (out / "prompts.json").write_text(json.dumps(prompts, indent=1))


def _truth(asked: Scene) -> dict[str, str]:
    """What the evaluator should read: of what was asked, all that can be seen."""
    unseen = hidden(asked)
    return {name: str(getattr(asked, name)) for name in _ASKED if name not in unseen}
