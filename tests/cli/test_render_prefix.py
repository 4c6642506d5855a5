"""Words that a LoRA needs before every prompt, and its recommended strength, in ``render``."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.prompt_prefix import PROMPT_PREFIX_KEY, add_prompt_prefixes
from hyperlora.pipelines.image_to_lora import ImageToLora

PREFIX = "fcsks fxhks fhyks, "
METADATA = LoraMetadata(extra={PROMPT_PREFIX_KEY: PREFIX}, recommended_strength=0.5)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a man", f"{PREFIX}a man"),
        (f"{PREFIX}a man", f"{PREFIX}a man"),
        ("fcsks fxhks fhyks a man", "fcsks fxhks fhyks a man"),
        ("fcsks, a man", f"{PREFIX}fcsks, a man"),
        ("", PREFIX),
    ],
)
def test_prefix_stands_once(prompt: str, expected: str) -> None:
    assert add_prompt_prefixes(prompt, [METADATA, METADATA, LoraMetadata()]) == expected


def test_render_adds_prefix_and_takes_the_recommended_strength(
    run: Any, bundle: Any, tmp_path: Path
) -> None:
    lora = ImageToLora.from_pretrained(str(bundle.model))(bundle.photo)
    replace(lora, metadata=METADATA).save(tmp_path / "special.safetensors")
    replace(lora, metadata=LoraMetadata()).save(tmp_path / "plain.safetensors")
    options = ("--base", bundle.base, "--steps", 2, "--seed", 1)

    def render(name: str, prompt: str, *loras: str) -> np.ndarray:
        path = tmp_path / f"{name}.png"
        arguments = [x for lora in loras for x in ("--lora", lora)]
        result = run("render", "-o", path, "--prompt", prompt, *options, *arguments)
        assert result.code == 0, result
        return np.asarray(Image.open(path), int)

    special, plain = (str(tmp_path / f"{name}.safetensors") for name in ("special", "plain"))
    expected = render("a", f"{PREFIX}a smiling man", f"{plain}:0.5")
    assert np.abs(render("b", "a smiling man", special) - expected).max() <= 1
    full = render("c", f"{PREFIX}a smiling man", plain)
    assert np.abs(full - expected).max() > 1
    assert np.abs(render("d", "a smiling man", f"{special}:1") - full).max() <= 1
