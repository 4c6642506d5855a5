"""Without a network, what is not cached is named in one sentence at once."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import huggingface_hub.constants
import pytest
from typer.testing import CliRunner

from hyperlora import hub_connection
from hyperlora.cli import app
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.encoders.timm_encoder import TimmEncoder
from hyperlora.errors import ModelLoadError
from tests.training.config_rules import CONFIGS

CONFIG = str(CONFIGS / "sd15/hypernetwork.yaml")


@pytest.fixture(autouse=True)
def online_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As for users, with an empty cache; other tests run in offline mode."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    can_reach_hub = hub_connection.can_reach_hub
    can_reach_hub.cache_clear()
    yield
    can_reach_hub.cache_clear()


@pytest.fixture
def unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_connection, "can_reach_hub", lambda: False)


def test_hub_is_reached_through_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        assert hub_connection.can_reach_hub()
        assert not hub_connection.require_cache_if_offline()
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_hub_that_does_not_answer_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    is_over = Event()

    def wait(*args: object) -> None:
        is_over.wait(30)
        raise TimeoutError

    monkeypatch.setattr(hub_connection.socket, "create_connection", wait)
    monkeypatch.setattr(hub_connection, "PROBE_TIMEOUT_S", 0.1)
    start = time.monotonic()
    assert hub_connection.require_cache_if_offline()
    assert hub_connection.require_cache_if_offline()
    assert time.monotonic() - start < 1
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    is_over.set()


@pytest.mark.usefixtures("unreachable_hub")
def test_loading_what_is_not_cached_names_it_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(ModelLoadError, match=r"^encoder 'vit_tiny_patch16_224\.augreg_in21k' is"):
        TimmEncoder("vit_tiny_patch16_224.augreg_in21k", pretrained=True)
    with pytest.raises(ModelLoadError, match=r"^base 'nobody/nothing' is not in the cache .* be "):
        load_diffusion_base("nobody/nothing")
    assert time.monotonic() - start < 3


@pytest.mark.usefixtures("unreachable_hub")
@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ([], "base 'stable-diffusion-v1-5/stable-diffusion-v1-5'"),
        (["--model.init_args.base", "{folder}"], "encoder 'vit_base_patch16_clip_224.openai'"),
        (["--model.init_args.base=someone/something"], "base 'someone/something'"),
    ],
)
def test_train_names_what_is_missing(
    arguments: list[str], missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    result = CliRunner().invoke(app, ["train", "fit", "--config", CONFIG, *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {missing} is not in the cache of the hub")
    assert len(result.stderr.splitlines()) == 1


def test_train_refuses_without_heavy_imports(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom hyperlora import hub_connection\n"
        "hub_connection.can_reach_hub = lambda: False\n"
        f"sys.argv = ['hyperlora', 'train', 'fit', '--config', {CONFIG!r}]\n"
        "from hyperlora.cli import main\n"
        "try:\n    main()\nexcept SystemExit as error:\n"
        "    print(error.code, 'torch' in sys.modules)"
    )
    environment = {"HF_HOME": str(tmp_path), "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2", "False"]
