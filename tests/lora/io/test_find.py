"""Names of LoRA files on disk, as prompts write them."""

import unicodedata
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file

from hyperlora.errors import InvalidArgumentError
from hyperlora.lora.io.find import find_lora

Form = Literal["NFC", "NFD"]


def write_lora(path: Path, **metadata: str) -> Path:
    """Write the smallest LoRA; its weights play no part here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{stem}.lora_down.weight": torch.ones(1, 2)}
    save_file(tensors | {f"{stem}.lora_up.weight": torch.ones(2, 1)}, path, metadata=metadata)
    return path


@pytest.mark.parametrize("disk_form", ["NFC", "NFD"])
@pytest.mark.parametrize("prompt_form", ["NFC", "NFD"])
def test_composed_and_decomposed_letters_are_equal(
    tmp_path: Path, disk_form: Form, prompt_form: Form
) -> None:
    name = "Ångström/Zoë"
    path = write_lora(tmp_path / f"{unicodedata.normalize(disk_form, name)}.safetensors")
    assert find_lora(tmp_path, unicodedata.normalize(prompt_form, name)) == path
    assert find_lora(tmp_path, unicodedata.normalize(prompt_form, "Zoë")) == path


@pytest.mark.parametrize("suffix", [".SAFETENSORS", ".SafeTensors", ".safetensors"])
def test_the_suffix_may_be_in_any_case(tmp_path: Path, suffix: str) -> None:
    path = write_lora(tmp_path / f"Me{suffix}")
    for name in ("Me", f"Me{suffix}", "Me.safetensors", "Me.SAFETENSORS"):
        assert find_lora(tmp_path, name) == path
    with pytest.raises(InvalidArgumentError, match="did you mean 'Me'"):
        find_lora(tmp_path, "me")


def test_backslashes_separate_folders(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "my loras" / "v1.5" / "x.y-1.0.safetensors")
    for name in (r"my loras\v1.5\x.y-1.0", "my loras/v1.5/x.y-1.0", "x.y-1.0"):
        assert find_lora(tmp_path, name) == path
    with pytest.raises(InvalidArgumentError, match="no LoRA called"):
        find_lora(tmp_path, r"..\my loras\v1.5\x.y-1.0")


def test_output_name_and_title_are_aliases_where_no_file_has_the_name(tmp_path: Path) -> None:
    renamed = write_lora(tmp_path / "v2-final.safetensors", ss_output_name="dress: red")
    titled = write_lora(tmp_path / "p.safetensors", **{"modelspec.title": "Anna"})
    thief = write_lora(tmp_path / "t.safetensors", ss_output_name="p", **{"modelspec.title": "T"})
    assert find_lora(tmp_path, "dress: red") == renamed
    assert find_lora(tmp_path, "Anna") == titled
    assert find_lora(tmp_path, "p") == titled  # the file, not the header
    assert find_lora(tmp_path, "T") == thief
    write_lora(tmp_path / "again.safetensors", ss_output_name="Anna")
    with pytest.raises(InvalidArgumentError, match=r"2 LoRAs are called .Anna.: .*again.*p\.safe"):
        find_lora(tmp_path, "Anna")


def test_of_equal_names_a_folder_decides(tmp_path: Path) -> None:
    top = write_lora(tmp_path / "same.safetensors")
    nested = write_lora(tmp_path / "old" / "same.safetensors")
    with pytest.raises(InvalidArgumentError, match=r"2 LoRAs are called 'same'.*or write \./NAME"):
        find_lora(tmp_path, "same")
    assert find_lora(tmp_path, "./same") == find_lora(tmp_path, r".\same") == top
    assert find_lora(tmp_path, "old/same") == nested


def test_imports_find_files_of_every_suffix(tmp_path: Path) -> None:
    from data_builder.build import import_files

    paths = [write_lora(tmp_path / "a" / "x.SAFETENSORS"), write_lora(tmp_path / "y.safetensors")]
    (tmp_path / "z.safetensors.part").write_bytes(b"")
    write_lora(tmp_path / ".hidden.safetensors")
    assert import_files.list_lora_files(tmp_path) == paths
