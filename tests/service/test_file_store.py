"""Stored files and the folder that one server owns; API keys."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hyperlora.errors import InvalidArgumentError
from hyperlora.service.file_store import FileStore, lock_directory
from hyperlora.service.settings import API_KEYS_ENV, load_api_keys
from tests.service.conftest import StartClient, post_photos


def test_lock_directory_admits_one_owner(tmp_path: Path) -> None:
    with (
        lock_directory(tmp_path),
        pytest.raises(InvalidArgumentError, match="another server uses"),
        lock_directory(tmp_path),
    ):
        pass
    with lock_directory(tmp_path):
        pass


def test_lock_directory_refuses_links(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("important")
    for target in ("notes", "nowhere", "lock"):
        (tmp_path / "lock").symlink_to(target)
        with pytest.raises(InvalidArgumentError, match="is a link"), lock_directory(tmp_path):
            pass
        (tmp_path / "lock").unlink()
    assert (tmp_path / "notes").read_text() == "important"
    assert not (tmp_path / "nowhere").exists()


def list_public_entries(folder: Path) -> list[str]:
    """List what other users of the machine can open below a folder."""

    def is_public(path: Path) -> bool:
        return bool(path.stat().st_mode & 0o077)

    entries = [path for path in folder.iterdir() if is_public(path) and path.name != "lock"]
    return [path.name for path in entries]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_lock_directory_makes_a_private_folder(tmp_path: Path) -> None:
    with lock_directory(tmp_path / "a" / "state"):
        assert (tmp_path / "a" / "state").stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
@pytest.mark.parametrize("is_old", [True, False])
def test_server_keeps_its_state_private(
    start_client: StartClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_old: bool
) -> None:
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    state_dir = tmp_path / "state"
    for folder in (state_dir, *((state_dir / name) for name in ("files", "ui") if is_old)):
        folder.mkdir()
        folder.chmod(0o755)
    if is_old:
        (state_dir / "jobs.sqlite").touch(0o644)
    client = start_client(with_ui=True)
    assert post_photos(client, store=True).status_code == 200
    assert {"files", "jobs.sqlite", "ui"} <= {path.name for path in state_dir.iterdir()}
    assert any((state_dir / "files").rglob("*.safetensors"))
    assert list_public_entries(state_dir) == []


def test_lock_directory_ends_with_a_killed_process(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from hyperlora.service.file_store import lock_directory\n"
        "with lock_directory(Path(sys.argv[1])):\n"
        "    print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"locked"
        with pytest.raises(InvalidArgumentError, match="another server"), lock_directory(tmp_path):
            pass
        process.kill()
    with lock_directory(tmp_path):
        pass


def test_file_store_finds_files_by_content_only(tmp_path: Path) -> None:
    files = FileStore(tmp_path / "files", 100)
    id = files.store_bytes(b"abc", "lora")
    assert files.get_bytes(id, "lora") == b"abc"
    assert files.get_bytes(id, "image") is None
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    for hostile_id in ("../secret", "../../secret", id.upper(), "", id + "\n", "."):
        assert files.get_bytes(hostile_id, "lora") is None
        assert not files.delete(hostile_id, "lora")
    assert files.delete(id, "lora")
    assert files.get_bytes(id, "lora") is None


def test_load_api_keys_reads_file_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys"
    path.write_text("first-key-123456\n\n  second-key-12345 \n")
    monkeypatch.setenv(API_KEYS_ENV, "third-key-1234567,")
    assert len(load_api_keys(path)) == 3
    path.write_text("short\n")
    with pytest.raises(InvalidArgumentError, match="shorter than 16"):
        load_api_keys(path)
    path.write_text("\n")
    monkeypatch.delenv(API_KEYS_ENV)
    with pytest.raises(InvalidArgumentError, match="holds no key"):
        load_api_keys(path)
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        load_api_keys(tmp_path / "none")
