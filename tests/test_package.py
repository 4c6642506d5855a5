"""The wheel holds the models, and its commands work where there is no repository."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hatchling.builders.wheel import WheelBuilder
from safetensors.torch import load_file

from hyperlora import pretrained
from hyperlora.diffusion.diffusion_base import load_diffusion_base
from hyperlora.diffusion.shared_components import SHARED_COMPONENTS_KEY
from hyperlora.errors import InvalidArgumentError, ModelLoadError
from hyperlora.lora.io.load import load_lora
from hyperlora.pipelines.auto import load_image_to_lora

ROOT = Path(__file__).parents[1]
WORKFLOWS_DIR = ROOT / ".github/workflows"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
AVATARS_DIR = ROOT / "checkpoints/avatars"
MAX_WHEEL_BYTES = 60_000_000
TRAINING_ONLY = {pretrained.FACE_PACK_DIR}
"""Bundled folders that no command needs by default; the repository alone has them."""
DEFAULT_DIRS = {
    folder
    for name, folder in vars(pretrained).items()
    if name.endswith("_DIR") and isinstance(folder, Path) and folder.parent == AVATARS_DIR
} - TRAINING_ONLY

RunCommand = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel_files() -> dict[str, Path]:
    """The file in the repository of each file in the wheel."""
    files = WheelBuilder(str(ROOT)).recurse_included_files()
    return {Path(file.distribution_path).as_posix(): Path(file.path) for file in files}


def test_wheel_holds_every_default_model(wheel_files: dict[str, Path]) -> None:
    assert len(DEFAULT_DIRS) == 8
    names = {
        f"hyperlora/{path.relative_to(ROOT).as_posix()}"
        for folder in DEFAULT_DIRS
        for path in folder.rglob("*")
        if path.is_file() and not any(parent.is_symlink() for parent in path.parents)
    }
    bundled = {name for name in wheel_files if name.startswith("hyperlora/checkpoints/")}
    assert bundled == names


def test_wheel_holds_every_source_file(wheel_files: dict[str, Path]) -> None:
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in ("hyperlora", "data_builder")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in wheel_files if "/checkpoints/" not in name} == sources


def test_every_link_of_the_bundle_is_named_for_the_wheel(wheel_files: dict[str, Path]) -> None:
    links = [path for path in AVATARS_DIR.rglob("*") if path.is_symlink()]
    assert {link.name for link in links} == {"vae", "text_encoder", "tokenizer"}
    for link in links:
        shared = json.loads((link.parent / "model_index.json").read_text())[SHARED_COMPONENTS_KEY]
        assert (link.parent / shared[link.name] / link.name).resolve() == link.resolve()
        target = link.resolve().relative_to(ROOT)
        assert any(name.startswith(f"hyperlora/{target}/") for name in wheel_files)


@pytest.mark.parametrize("layout", ["wheel", "repository"])
def test_bundle_is_found_in_wheel_and_repository(layout: str, tmp_path: Path) -> None:
    package_dir = tmp_path / "hyperlora"
    parent = package_dir if layout == "wheel" else tmp_path
    (parent / "checkpoints/avatars").mkdir(parents=True)
    assert pretrained.find_avatars_dir(package_dir) == parent / "checkpoints/avatars"


def test_bundle_that_is_nowhere_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "AVATARS_DIR", pretrained.find_avatars_dir(tmp_path))
    for load, name in ((load_diffusion_base, "base"), (load_image_to_lora, "image-to-lora")):
        with pytest.raises(ModelLoadError, match=f"lacks the bundled '{name}', .* install"):
            load(pretrained.AVATARS_DIR / name)


def test_configs_that_are_not_there_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyperlora.training.cli import train

    monkeypatch.chdir(tmp_path)
    for arguments in (["--config", "configs/a.yaml"], ["--config=configs/a.yaml"]):
        with pytest.raises(InvalidArgumentError, match=r"'configs/a.yaml' does not exist: .*clone"):
            train(["fit", *arguments])


def test_extra_all_holds_every_extra() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    (requirement,) = extras["all"]
    names = re.fullmatch(r"hyperlora\[(.*)\]", requirement)
    assert names and set(names[1].split(",")) == extras.keys() - {"all"}


@pytest.mark.parametrize("name", ["ci", "release"])
def test_workflow_grants_no_more_than_it_needs(name: str) -> None:
    workflow = yaml.safe_load((WORKFLOWS_DIR / f"{name}.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    writers = {
        job: {key for key, value in content["permissions"].items() if value == "write"}
        for job, content in workflow["jobs"].items()
        if "permissions" in content
    }
    expected = {"publish": {"id-token"}, "github-release": {"contents"}}
    assert writers == (expected if name == "release" else {})


def test_ci_workflow_runs_what_the_classifiers_promise() -> None:
    jobs = yaml.safe_load((WORKFLOWS_DIR / "ci.yml").read_text())["jobs"]
    assert ".ci/run" in [step.get("run") for step in jobs["tests"]["steps"]]
    classifiers = PYPROJECT["project"]["classifiers"]
    versions = {c.rsplit(" ", 1)[-1] for c in classifiers if "Python :: 3." in c}
    for job in jobs.values():
        if "strategy" in job:
            assert set(job["strategy"]["matrix"]["python"]) == versions


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("uv") is None:
        pytest.skip("uv builds the wheel")
    output_dir = tmp_path_factory.mktemp("dist")
    run_uv("build", "--wheel", "--out-dir", output_dir, ROOT)
    (path,) = output_dir.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def run_installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> RunCommand:
    """Run a program of an environment that has hyperlora from the wheel, in an empty folder.

    The environment reads the dependencies from the one of this test: they are gigabytes. A folder
    in a ``.pth`` file has its own ``.pth`` files ignored, and with them an editable hyperlora.
    """
    environment = tmp_path_factory.mktemp("installed") / "venv"
    run_uv("venv", "--python", sys.executable, environment)
    python = environment / "bin/python"
    run_uv("pip", "install", "--no-deps", "--python", python, wheel)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own_dir = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    dependencies = f"{sysconfig.get_path('purelib')}\n"
    (Path(own_dir.stdout.strip()) / "dependencies.pth").write_text(dependencies)
    working_dir = tmp_path_factory.mktemp("empty")

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return subprocess.run(
            [environment / "bin" / program, *map(str, arguments)],
            cwd=working_dir,
            env=variables | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )

    return run


def run_uv(*arguments: object) -> None:
    """Run uv; its output is shown if it fails."""
    result = subprocess.run(["uv", *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def find_installed_dir(run_installed: RunCommand) -> Path:
    """Return the folder of the bundle in the environment of the wheel."""
    code = "import hyperlora, hyperlora.pretrained as p; print(hyperlora.__file__, p.AVATARS_DIR)"
    module_path, avatars_dir = run_installed("python", "-c", code).stdout.split()
    assert ROOT not in Path(module_path).parents
    assert Path(avatars_dir) == Path(module_path).parent / "checkpoints/avatars"
    return Path(avatars_dir)


@pytest.mark.slow
def test_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size <= MAX_WHEEL_BYTES, (
        "base/text_encoder in float16 saves 0.5 MB; models in a wheel of their own save the code"
    )


@pytest.mark.slow
def test_installed_wheel_generates_the_lora_of_the_repository(
    run_installed: RunCommand, tmp_path: Path
) -> None:
    assert "generate" in run_installed("hyperlora", "--help").stdout
    photo = find_installed_dir(run_installed) / "test/subjects/person-1100000/0.webp"
    result = run_installed("hyperlora", "generate", photo, "-o", tmp_path / "me.safetensors")
    assert result.returncode == 0, result.stderr
    assert "rank 4 for avatars/base" in result.stdout
    expected_path = tmp_path / "expected.safetensors"
    load_image_to_lora(pretrained.IMAGE_TO_LORA_DIR)([photo]).save(expected_path)
    torch.testing.assert_close(load_file(tmp_path / "me.safetensors"), load_file(expected_path))


@pytest.mark.heavy
def test_commands_of_the_installed_wheel_work(run_installed: RunCommand, tmp_path: Path) -> None:
    avatars_dir = find_installed_dir(run_installed)
    photo = avatars_dir / "test/subjects/person-1100000/0.webp"
    pair = [
        avatars_dir / f"test-edits/000-glasses/shown-0_{side}.webp" for side in ("before", "after")
    ]
    lora, edit = tmp_path / "me.safetensors", tmp_path / "edit.safetensors"
    prompt = ["--prompt", "a portrait of sks person, smiling"]
    edited = ["--images", photo, "--images-dir", tmp_path / "edited"]
    for arguments in (
        ["generate", photo, "-o", lora],
        ["generate", photo, "--method", "lora-diffusion", "-o", tmp_path / "sample.safetensors"],
        ["render", "--lora", lora, *prompt, "-o", tmp_path / "me.png"],
        ["edit", *pair, *edited, "-o", edit],
        ["evaluate", "--num-subjects", 2, "--report-dir", tmp_path / "report"],
        ["demo", "--num-subjects", 1, "-o", tmp_path / "demo"],
    ):
        result = run_installed("hyperlora", *arguments)
        assert result.returncode == 0, (arguments, result.stderr)
    for name in ("me.png", "edited/0.png", "report/report.md", "demo/demo.png", "demo/edits.png"):
        assert (tmp_path / name).stat().st_size > 1000, name
    assert load_lora(edit).weights.layout.base == "avatars/edit-base"
