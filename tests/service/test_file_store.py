"""Stored files and the folder that one server owns; API keys."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hyperlora.errors import InvalidArgumentError
from hyperlora.service.file_store import FileStore, StorageError, lock_directory
from hyperlora.service.job_table import JobTable
from hyperlora.service.settings import API_KEYS_ENV, hash_key, load_api_keys
from tests.service.conftest import StartClient, assert_problem, post_photos


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
    id = files.store_bytes(b"abc", "lora", "me")
    assert files.get_bytes(id, "lora", "me") == b"abc"
    assert files.get_bytes(id, "image", "me") is None
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    for hostile_id in ("../secret", "../../secret", id.upper(), "", id + "\n", "."):
        assert files.get_bytes(hostile_id, "lora", "me") is None
        assert not files.delete(hostile_id, "lora", "me")
    assert files.delete(id, "lora", "me")
    assert files.get_bytes(id, "lora", "me") is None


@pytest.mark.parametrize("owners", [("me", "you"), ("0123456789abcdef", "../me"), ("a/b", "a")])
def test_file_store_keeps_the_files_of_owners_apart(
    tmp_path: Path, owners: tuple[str, str]
) -> None:
    files = FileStore(tmp_path / "files", 100)
    mine, yours = owners
    id = files.store_bytes(b"abc", "lora", mine)
    assert files.get_bytes(id, "lora", yours) is None
    assert not files.delete(id, "lora", yours)
    assert files.store_bytes(b"abc", "lora", yours) == id
    assert files.delete(id, "lora", mine)
    assert files.get_bytes(id, "lora", mine) is None
    assert files.get_bytes(id, "lora", yours) == b"abc", "only the other owner's has gone"
    assert files.delete(id, "lora", yours)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not left, "the file goes with its last owner"


def test_file_store_tells_of_a_full_disk_and_keeps_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = FileStore(tmp_path / "files", 100)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(StorageError, match="the disk of the server is full"):
            files.store_bytes(b"abc", "lora", "me")
    assert files.get_bytes(files.store_bytes(b"abc", "lora", "me"), "lora", "me") == b"abc"


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


KEYS = ("a-long-enough-key", "another-long-key!")


def test_stored_files_belong_to_their_owners(start_client: StartClient) -> None:
    """Two callers with the same photo and title make the same file."""
    client = start_client(key_digests=frozenset(map(hash_key, KEYS)))
    mine, yours = ({"X-API-Key": key} for key in KEYS)
    stored = post_photos(client, headers=mine, store="true")
    path = f"/v1/loras/{stored.headers['etag'][1:-1]}"
    unknown_path = f"/v1/loras/{'0' * 64}"
    assert post_photos(client, headers=yours).content == stored.content
    for method in ("GET", "DELETE"):
        refused = client.request(method, path, headers=yours)
        nowhere = client.request(method, unknown_path, headers=yours)
        assert refused.status_code == 404
        assert refused.text.replace(path[-64:], "0" * 64) == nowhere.text, "it reveals nothing"
    body = {"prompt": "a", "num_inference_steps": 1, "loras": [{"id": path[-64:]}]}
    assert client.post("/v1/images", json=body, headers=yours).status_code == 404
    assert client.post("/v1/images", json=body, headers=mine).status_code == 200
    post_photos(client, headers=yours, store="true")
    assert client.delete(path, headers=mine).status_code == 204
    assert client.get(path, headers=mine).status_code == 404
    assert client.get(path, headers=yours).content == stored.content


def test_a_full_disk_refuses_with_a_sentence_and_heals(
    start_client: StartClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = start_client()

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail_insert(*_: object) -> None:
        raise StorageError

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        patch.setattr(JobTable, "insert", fail_insert)
        for options in ({"store": "true"}, {"headers": {"Prefer": "respond-async"}}):
            refused = post_photos(client, **options)
            assert_problem(refused, 503, "the disk of the server is full")
            assert refused.headers["retry-after"]
        assert post_photos(client).status_code == 200
    assert "Traceback" not in caplog.text
    assert post_photos(client, store="true").status_code == 200
    accepted = post_photos(client, headers={"Prefer": "respond-async"})
    assert "event: succeeded" in client.get(accepted.headers["location"] + "/events").text


def test_the_sweep_survives_its_errors(
    start_client: StartClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([OSError("busy"), RuntimeError("odd")])
    delete_stale = JobTable.delete_stale

    def fail_twice(table: JobTable, retention_s: float) -> None:
        for error in errors:
            raise error
        delete_stale(table, retention_s)

    monkeypatch.setattr(JobTable, "delete_stale", fail_twice)
    client = start_client(retention_s=0.3, sweep_interval_s=0.05)
    post_photos(client, store="true")
    folder = tmp_path / "state" / "files"
    deadline = time.monotonic() + 5
    while list(folder.rglob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(folder.rglob("*.safetensors"))
    assert "hyperlora_sweep_errors_total 2.0" in client.get("/metrics").text
