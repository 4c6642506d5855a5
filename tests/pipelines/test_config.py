"""Settings of the pipelines, checked when they are made."""

from typing import Any

import pytest

from hyperlora.errors import InvalidArgumentError
from hyperlora.pipelines.config import EditConfig, GenerationConfig


@pytest.mark.parametrize(
    ("config_class", "options", "sentence"),
    [
        (GenerationConfig, {"format": "onnx"}, "unknown format 'onnx'"),
        (GenerationConfig, {"strength": float("nan")}, "strength between -10 and 10"),
        (GenerationConfig, {"rank": 0}, "must be at least 1"),
        (GenerationConfig, {"num_loras": 0}, "must be at least 1"),
        (GenerationConfig, {"refine_steps": -1}, "at least 0"),
        (GenerationConfig, {"refine_method": "photos"}, "give refine_steps"),
        (EditConfig, {"format": "gguf"}, "known: auto, diffusers, kohya, sgm, comfyui"),
        (EditConfig, {"strength": 11}, "strength between -10 and 10"),
        (EditConfig, {"candidate_prompts": ("a hat",), "search": False}, "leave one out"),
    ],
)
def test_config_refuses_invalid_values(
    config_class: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=sentence):
        config_class(**options)


def test_generation_config_needs_base_to_refine_or_rerank() -> None:
    assert not GenerationConfig(num_loras=3, num_candidates=3).needs_base
    assert GenerationConfig(num_loras=2, num_candidates=3).needs_reranking
    assert GenerationConfig(num_loras=2, num_candidates=3).needs_base
    assert GenerationConfig(refine_steps=1).needs_base


def test_check_folder_refuses_several_loras_per_subject() -> None:
    with pytest.raises(InvalidArgumentError, match="leave out --input-dir"):
        GenerationConfig(num_loras=2).check_folder()
    GenerationConfig(num_candidates=2).check_folder()
    with pytest.raises(InvalidArgumentError, match="leave out --ray"):
        GenerationConfig(num_candidates=2).check_folder(use_ray=True)
