"""A pipeline finds the components it shares with another, with links and without."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline

from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.shared_components import SHARED_COMPONENTS_KEY, load_shared_components
from hyperlora.errors import ModelLoadError

SHARED = ("vae", "text_encoder", "tokenizer")


@pytest.fixture
def unlinked_dir(bundle: Any, tmp_path: Path) -> Path:
    """A copy of the edit base without links, beside a copy of the base."""
    shutil.copytree(bundle.base, tmp_path / bundle.base.name)
    folder = shutil.copytree(bundle.edit_base, tmp_path / "edit-base", symlinks=True)
    for name in SHARED:
        (folder / name).unlink()
    return folder


def test_pipeline_without_links_equals_one_with_links(bundle: Any, unlinked_dir: Path) -> None:
    linked = load_diffusion_base(bundle.edit_base).pipeline
    unlinked = load_diffusion_base(unlinked_dir).pipeline
    for name in ("unet", "vae", "text_encoder"):
        state_dict = getattr(unlinked, name).state_dict()
        for key, tensor in getattr(linked, name).state_dict().items():
            assert torch.equal(tensor, state_dict[key]), key
            assert tensor.dtype == state_dict[key].dtype
    prompts = ["a portrait of sks person"]
    assert unlinked.tokenizer(prompts).input_ids == linked.tokenizer(prompts).input_ids


def test_text_files_in_place_of_links_count_as_missing(unlinked_dir: Path) -> None:
    """So git writes links where the file system has none."""
    for name in SHARED:
        (unlinked_dir / name).write_text(f"../base/{name}")
    components = load_shared_components(unlinked_dir, torch.float16)
    assert set(components) == set(SHARED)
    assert components["vae"].dtype == components["text_encoder"].dtype == torch.float16


def test_diffusers_ignores_the_key(bundle: Any, tmp_path: Path) -> None:
    assert SHARED_COMPONENTS_KEY in (bundle.edit_base / "model_index.json").read_text()
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(bundle.edit_base)
    pipeline.save_pretrained(tmp_path)  # whole, so it shares nothing any more
    assert SHARED_COMPONENTS_KEY not in (tmp_path / "model_index.json").read_text()
    assert (tmp_path / "vae").is_dir()


def test_components_of_a_missing_pipeline_are_one_sentence(unlinked_dir: Path) -> None:
    model_index = json.loads((unlinked_dir / "model_index.json").read_text())
    model_index[SHARED_COMPONENTS_KEY] = {"vae": "../elsewhere"}
    (unlinked_dir / "model_index.json").write_text(json.dumps(model_index))
    with pytest.raises(ModelLoadError, match=r"shares its vae with .*elsewhere, which is not"):
        load_diffusion_base(unlinked_dir)


@pytest.mark.parametrize("class_path", [["os", "system"], ["diffusers", "nonsense"], None], ids=str)
def test_other_classes_are_refused(unlinked_dir: Path, class_path: object) -> None:
    model_index = json.loads((unlinked_dir / "model_index.json").read_text())
    (unlinked_dir / "model_index.json").write_text(json.dumps(model_index | {"vae": class_path}))
    with pytest.raises(ModelLoadError, match="a class of diffusers or transformers was expected"):
        load_diffusion_base(unlinked_dir)


@pytest.mark.parametrize("text", ["[]", '{"_shared_components": 3}', "{"])
def test_damaged_index_is_one_sentence(unlinked_dir: Path, text: str) -> None:
    (unlinked_dir / "model_index.json").write_text(text)
    with pytest.raises(ModelLoadError, match="cannot be loaded as a diffusers pipeline"):
        load_diffusion_base(unlinked_dir)
