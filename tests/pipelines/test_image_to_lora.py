"""A released model: its card travels with it and says how strong its LoRAs are."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hyperlora.pipelines import ImageToLora, load_base


def test_the_strength_of_its_card_multiplies_what_it_makes(bundle: Any, tmp_path: Path) -> None:
    base = load_base(bundle.base)
    model = ImageToLora.from_pretrained(bundle.model, base=base)
    photo = Image.linear_gradient("L").resize((20, 20)).convert("RGB")
    plain = model(photo)
    model.card["strength"] = 1.5
    model.save_pretrained(tmp_path / "stronger")
    stronger = ImageToLora.from_pretrained(tmp_path / "stronger", base=base)
    torch.testing.assert_close(stronger(photo).norms(), plain.norms() * 1.5, rtol=1e-2, atol=1e-3)  # stored as fp16
    torch.testing.assert_close(stronger(photo, strength=0.5).norms(), stronger(photo).norms() * 0.5)
