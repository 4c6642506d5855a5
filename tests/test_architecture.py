"""The directions between folders (contracts in pyproject.toml) and the house rules on files."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest
from importlinter.cli import lint_imports

import hyperlora

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("hyperlora/**/*.py"), *ROOT.glob("data_builder/**/*.py")])
MODULES = [module.name for module in pkgutil.walk_packages(hyperlora.__path__, "hyperlora.")]


def test_imports_keep_the_contracts(capsys: pytest.CaptureFixture[str]) -> None:
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert status == 0, capsys.readouterr().out


TOP_LEVEL = {
    "errors",
    "progress",
    "features",
    "pretrained",
    "cpu",
    "compute",
    "ray_connection",
    "seeds",
}
ALLOWED_IMPORTS = {
    "evaluation": {"pipelines", "finetuning", "diffusion", "encoders", "data", "lora"},
    "service": {
        "pipelines",
        "diffusion",
        "encoders",
        "data",
        "lora",
        "client",
    },  # the web UI is a client
}


@pytest.mark.parametrize("package", ALLOWED_IMPORTS)
def test_outer_packages_import_few_others(package: str) -> None:
    """Literally: import-linter's layers also let them reach everything below."""
    allowed = {package, *ALLOWED_IMPORTS[package], *TOP_LEVEL}
    graph = grimp.build_graph("hyperlora", cache_dir=None)
    for module in sorted(name for name in graph.modules if name.split(".")[1:2] == [package]):
        imported = {
            name.split(".")[1]
            for name in graph.find_modules_directly_imported_by(module)
            if "." in name
        }
        assert imported <= allowed, f"{module} imports {sorted(imported - allowed)} of hyperlora"


POSIX_ONLY = {"fcntl", "grp", "posix", "pwd", "resource", "termios"}
"""Modules that Windows lacks."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_import_on_windows(path: Path) -> None:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in body if isinstance(node, ast.ImportFrom)}
    assert not names & POSIX_ONLY
    assert "os.sysconf" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_named_after_what_they_hold(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    names = {*path.relative_to(ROOT).with_suffix("").parts}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name: str) -> None:
    importlib.import_module(name)


def test_import_hyperlora_needs_no_extra() -> None:
    code = "import hyperlora, sys; print(*{m.split('.')[0] for m in sys.modules})"
    imported = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert not {"insightface", "onnxruntime", "fastapi", "uvicorn", "gradio", "ray"} & set(
        imported.split()
    )


def test_import_hyperlora_is_instant() -> None:
    code = "import hyperlora, sys; dir(hyperlora); print(*{m.split('.')[0] for m in sys.modules})"
    imported = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert not {"torch", "numpy", "PIL", "diffusers", "transformers", "typer"} & set(
        imported.split()
    )


@pytest.mark.parametrize("name", hyperlora.__all__)
def test_every_public_name_opens(name: str) -> None:
    assert getattr(hyperlora, name).__name__ == name
    assert hyperlora._MODULES.keys() == set(hyperlora.__all__)


def test_other_names_are_unknown() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        hyperlora.nonsense  # noqa: B018


READING_PATH = (
    "pipelines/image_to_lora.py",
    "encoders/timm_encoder.py",
    "models/hypernetwork.py",
    "lora/heads.py",
    "lora/layout.py",
    "lora/weights.py",
    "lora/io/save.py",
    "diffusion/lora_injection.py",
    "diffusion/text_to_image.py",
)
"""From a photo to a LoRA file and to an image, after ``examples/photo_to_lora.py``."""


def test_reading_path_is_what_the_documentation_shows() -> None:
    page = (ROOT / "docs/concepts/architecture.md").read_text(encoding="utf-8")
    section = page.split("## The reading path")[1].split("\n## ")[0]
    shown = re.findall(r"`((?:hyperlora|examples)/[\w/]+\.py)`", section)
    assert shown == ["examples/photo_to_lora.py", *(f"hyperlora/{name}" for name in READING_PATH)]
    assert all((ROOT / name).is_file() for name in shown)


def test_one_pipeline_loads_no_other() -> None:
    code = "import hyperlora.pipelines.image_to_lora, sys; print(*sys.modules)"
    imported = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    packages = {name.split(".")[1] for name in imported if name.startswith("hyperlora.")}
    assert not packages & {"finetuning", "training", "evaluation", "service", "cli"}
    assert not {
        f"hyperlora.diffusion.{name}" for name in ("multi_lora", "autolora_guidance")
    } & set(imported)
    assert "hyperlora.pipelines.pair_to_lora" not in imported


def test_no_circles_of_files() -> None:
    graph = grimp.build_graph("hyperlora", "data_builder", cache_dir=None)
    remaining = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    while leaves := [
        name for name, imported in remaining.items() if not imported & remaining.keys()
    ]:
        for name in leaves:
            del remaining[name]
    assert not remaining, f"files import each other in a circle, among {sorted(remaining)[:20]}"
