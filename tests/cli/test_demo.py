"""``hyperlora demo``: sheets and LoRA files of the bundled models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyperlora.lora.io.load import load_lora

RunCommand = Callable[..., Any]


def test_demo_writes_sheets_and_loras(
    run: RunCommand, bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyperlora import pretrained

    tiny_dirs = {
        "BASE_DIR": bundle.base,
        "IMAGE_TO_LORA_DIR": bundle.model,
        "EVALUATOR_DIR": bundle.evaluator,
        "BENCHMARK_DIR": bundle.benchmark,
        "EDIT_BASE_DIR": bundle.edit_base,
        "PAIR_TO_LORA_DIR": bundle.pair_model,
        "EDIT_BENCHMARK_DIR": bundle.edit_benchmark,
        "MODEL_DIR_BY_METHOD": {"hypernetwork": bundle.model},
    }
    for name, folder in tiny_dirs.items():
        monkeypatch.setattr(pretrained, name, folder)
    result = run("demo", "-o", tmp_path / "demo", "--num-subjects", 2)
    assert result.code == 0, result
    assert "ms from photo to LoRA" in result.out
    rows = [line.split("│")[1].strip() for line in result.out.splitlines() if line.count("│") == 4]
    assert rows == ["base, no LoRA", "one photo"]
    edits = tmp_path / "demo" / "edits"
    assert sorted(p.name for p in edits.iterdir()) == ["darker.safetensors", "inverted.safetensors"]
    names = sorted(p.name for p in (tmp_path / "demo").iterdir() if p != edits)
    subjects = ("person-0", "person-1")
    assert names == [
        "demo.png",
        "edits.png",
        *(f"{p}.safetensors" for p in subjects),
    ]
    assert load_lora(tmp_path / "demo" / "person-1.safetensors").format == "kohya"
