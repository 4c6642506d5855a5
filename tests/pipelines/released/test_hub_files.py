"""Repositories on a hub: recognized from headers, fetched in part, resumed, offline."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyperlora.errors import ModelLoadError
from hyperlora.pipelines.released.hub_files import FolderFiles, open_files, split_variant
from hyperlora.pipelines.released.recognize import recognize
from hyperlora.pipelines.released.tensor_headers import read_file_header
from tests.pipelines.released.hub_server import HubServer, serve_hub
from tests.pipelines.released.tiny_hyperlora import GOLDEN, draw_portrait, save_world

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    (root / "org").mkdir()
    return save_world(root / "org").parent


@pytest.fixture
def hub(world: Path) -> Iterator[HubServer]:
    with serve_hub(world) as server:
        yield server


def run_online(server: HubServer, home: Path, *arguments: Any) -> Any:
    """Run a command whose hub is the server."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "MODELSCOPE_DOMAIN": server.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
        "no_proxy": "127.0.0.1",
    }
    environment.pop("HF_HUB_CACHE", None)
    code = "from hyperlora.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_inspect_reads_headers_alone(world: Path, hub: HubServer, tmp_path: Path) -> None:
    big = {"layer.weight": torch.zeros(400_000), "b": torch.zeros(2)}
    (world / "org/other").mkdir(exist_ok=True)
    save_file(big, world / "org/other/model.safetensors")
    result = run_online(hub, tmp_path, "inspect", "hub:org/other", "--json")
    assert result.returncode == 0, result.stderr
    info = json.loads(result.stdout)
    assert info["kind"] == "unknown" and info["sizes"]["model.safetensors"] > 1_600_000
    assert info["files"]["model.safetensors"]["tensors"]["layer.weight"] == ["F32", [400_000]]
    assert hub.sent["org/other/model.safetensors"] <= 100_000
    result = run_online(hub, tmp_path, "inspect", "hub:org/HyperLoRA:edit")
    assert result.returncode == 0, result.stderr
    assert "hyperlora-sdxl" in result.stdout and "CC BY-NC 4.0" in result.stdout
    assert "variants: edit, fidelity" in result.stdout
    assert "proj_out.weight F16 [8, 48]" in result.stdout
    assert "_fidelity/resampler" not in result.stdout


def test_generate_fetches_one_variant_and_the_vision_half(
    world: Path, hub: HubServer, tmp_path: Path
) -> None:
    draw_portrait(3).save(tmp_path / "me.png")
    pack = ("--face-pack", world / "org/antelopev2", "--encoder", "org/clip")
    arguments = ("generate", tmp_path / "me.png", "--model", "org/HyperLoRA:edit", *pack)
    hub.max_bytes = 150_000
    result = run_online(hub, tmp_path / "home", *arguments, "-o", tmp_path / "x.safetensors")
    hub.max_bytes = None
    if result.returncode:  # the connection broke; the same command goes on
        assert "run the same command again" in result.stderr and "Traceback" not in result.stderr
        assert not (tmp_path / "x.safetensors").exists()
        result = run_online(hub, tmp_path / "home", *arguments, "-o", tmp_path / "x.safetensors")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "x.safetensors").is_file()
    assert not any("_fidelity/" in path for path in hub.sent)
    (part,) = (tmp_path / "home/hyperlora/hub/org/clip").rglob("*.safetensors")
    tensors = load_file(part)
    expected = load_file(world / "org/clip/model.safetensors")
    assert tensors.keys() == {key for key in expected if key.startswith("vision_model.")}
    assert all(torch.equal(tensors[key], expected[key]) for key in tensors)
    sent = sum(hub.sent.values())
    offline = ("-o", tmp_path / "y.safetensors", "--offline")
    result = run_online(hub, tmp_path / "home", *arguments, *offline)
    assert result.returncode == 0, result.stderr
    assert sum(hub.sent.values()) == sent, "nothing is fetched again"
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in "xy")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_modelscope_serves_what_the_hub_lacks(hub: HubServer, tmp_path: Path) -> None:
    hub.hidden.add("org/HyperLoRA")
    result = run_online(hub, tmp_path, "inspect", "hub:org/HyperLoRA:fidelity", "--json")
    assert result.returncode == 0, result.stderr
    info = json.loads(result.stdout)
    assert info["kind"] == "hyperlora-sdxl" and "ModelScope" in info["origin"]
    for name, sentence in (("org/none", "is neither a folder nor a reachable hub id"),):
        result = run_online(hub, tmp_path, "inspect", f"hub:{name}")
        assert result.returncode == 2 and sentence in result.stderr, result.stderr
        assert "Traceback" not in result.stderr


def test_offline_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelLoadError, match="is not in the cache of the hub"):
        open_files("someone/never-fetched", offline=True)
    with pytest.raises(ModelLoadError, match="neither a folder nor a reachable hub id"):
        open_files(str(tmp_path / "nowhere"))


def test_split_variant(tmp_path: Path) -> None:
    assert split_variant("org/name:edit") == ("org/name", "edit")
    assert split_variant(f"{tmp_path}:edit") == (str(tmp_path), "edit")
    assert split_variant("org/name") == ("org/name", "")
    (tmp_path / "a:b").mkdir()
    assert split_variant(f"{tmp_path}/a:b") == (f"{tmp_path}/a:b", "")


def test_recognize_tells_the_kinds(tmp_path: Path) -> None:
    i2l = recognize(FolderFiles(GOLDEN / "z-image-i2l-tiny-1"))
    assert (i2l.kind, i2l.variant, i2l.files) == ("i2l-v1", "z-image", ("model.safetensors",))
    hyperlora = recognize(FolderFiles(GOLDEN / "hyperlora-sdxl-tiny-1"))
    assert hyperlora.kind == "hyperlora-sdxl"
    (tmp_path / "template").mkdir()
    (tmp_path / "template/model.py").write_text("raise SystemExit")
    assert recognize(FolderFiles(tmp_path / "template")).kind == "template"
    (tmp_path / "lorweb").mkdir()
    keys = {"transformer.x.lora_keys": torch.zeros(3, 2), "transformer.x.lora_A": torch.zeros(3, 1)}
    save_file(keys, tmp_path / "lorweb/lorweb_model.safetensors")
    assert recognize(FolderFiles(tmp_path / "lorweb")).kind == "lorweb"


def test_digest_is_that_of_names_and_shapes(tmp_path: Path) -> None:
    import hashlib

    save_file({"b": torch.zeros(2, 3), "a.c": torch.zeros(())}, tmp_path / "x.safetensors")
    texts = sorted(["b:2_3", "b", "a.c:", "a.c"])
    expected = hashlib.md5(",".join(texts).encode()).hexdigest()
    assert read_file_header(tmp_path / "x.safetensors").digest == expected


def test_cut_off_files_are_told_from_the_header(tmp_path: Path) -> None:
    save_file({"b": torch.zeros(2, 3)}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    for cut, sentence in ((data[:-4], "is cut off"), (data[:20], "header"), (b"", "header")):
        (tmp_path / "y.safetensors").write_bytes(cut)
        with pytest.raises(ModelLoadError, match=sentence):
            read_file_header(tmp_path / "y.safetensors")
