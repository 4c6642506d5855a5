"""The commands and programs of README, *Get started* and *Guides* run on the bundled models."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from data_builder.cli import app as data_builder_app
from hyperlora.cli import app as hyperlora_app
from tests.docs_fixtures import (
    few_steps,  # noqa: F401
    make_reader_dir,
    read_expected_output,
    remove_numbers,
    run_example,  # noqa: F401
    server_url,  # noqa: F401
)

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs/get-started").glob("*.md")),
    *sorted((ROOT / "docs/guides").glob("*.md")),
]
ALL_PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if "lab-notes" not in p.parts),
    *sorted((ROOT / "checkpoints").rglob("README.md")),
]
BLOCK = re.compile(
    r"(?:^ *<!-- (?P<note>[^\n]*) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w+)\n(?P<body>.*?)^(?P=indent)```",
    re.DOTALL | re.MULTILINE,
)
APPS = {"hyperlora": hyperlora_app, "data-builder": data_builder_app}
QUICK_OPTIONS = {
    "evaluate": ["--num-subjects", "2", "--steps", "2"],
    "render": ["--steps", "4"],
}
"""Options that make a command shorter; the path through the code stays the same."""
DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class Block:
    """One fenced block of a page, with the comment before it."""

    language: str
    body: str
    note: str

    @property
    def is_run(self) -> bool:
        """Whether the block is for this test."""
        return self.language in ("bash", "python") and not self.note.startswith("not run")

    @property
    def needs_server(self) -> bool:
        """Whether the block talks to a running server."""
        return self.note == "server"


def parse_blocks(path: Path) -> list[Block]:
    """Parse the fenced blocks of a page."""
    return [
        Block(match["language"], dedent(match["body"]), match["note"] or "")
        for match in BLOCK.finditer(path.read_text())
    ]


def run_cli(command: str) -> None:
    """Run a ``hyperlora`` or ``data-builder`` command in this process."""
    program, *arguments = shlex.split(command, comments=True)
    result = CliRunner().invoke(APPS[program], [*arguments, *QUICK_OPTIONS.get(arguments[0], [])])
    assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"


def run_bash(script: str) -> None:
    """Run lines of a shell; the first failure ends them."""
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, f"{script}\n{result.stderr[-2000:]}"


def run_block(block: Block, url: str) -> None:
    """Run one block; a program starts with an empty namespace."""
    body = block.body.replace(DEFAULT_URL, url)
    if block.language == "python":
        exec(compile(body, "block", "exec"), {"__name__": "__main__"})
    elif block.needs_server:
        run_bash(body)
    else:
        for line in body.replace("\\\n", " ").splitlines():
            if line.split(" ")[0] in APPS:
                run_cli(line)
            elif line.strip() and not line.startswith("uv run"):  # README's two commands: below
                run_bash(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.usefixtures("few_steps")
def test_page_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    blocks = [block for block in parse_blocks(page) if block.is_run]
    needs_server = any(block.needs_server for block in blocks)
    url = request.getfixturevalue("server_url") if needs_server else DEFAULT_URL
    monkeypatch.chdir(make_reader_dir(tmp_path))
    for block in blocks:
        run_block(block, url)
    for name in set(re.findall(r"-o (\w[\w-]*)\.(?:safetensors|png)", str(blocks))):
        sizes = [path.stat().st_size for path in tmp_path.glob(f"{name}*.*")]
        assert sizes and min(sizes) > 1000, name


def test_client_example_prints_expected_output(
    run_example: Callable[..., str],  # noqa: F811
    server_url: str,  # noqa: F811
) -> None:
    printed = run_example("http_client", server_url).splitlines()
    expected = read_expected_output("http_client")
    assert list(map(remove_numbers, printed)) == list(map(remove_numbers, expected))


@pytest.mark.usefixtures("few_steps")
def test_readme_table_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = re.findall(r"\| `(hyperlora [^`]*)` \|", (ROOT / "README.md").read_text())
    commands = [cell for cell in cells if "..." not in cell and "serve" not in cell]
    assert len(commands) == 5
    monkeypatch.chdir(make_reader_dir(tmp_path))
    subjects_dir, pair_dir = (
        Path("checkpoints/avatars/test/subjects"),
        Path("checkpoints/avatars/test-edits/000-glasses"),
    )
    Path("photos").mkdir()
    for name in ("me.webp", "photos/anna.webp"):
        shutil.copy(subjects_dir / "person-1100000/0.webp", name)
    for name in ("before", "after"):
        (source,) = sorted(pair_dir.glob(f"*0_{name}.webp"), reverse=True)[:1]
        shutil.copy(source, f"{name}.webp")
    for command in commands:
        run_cli(command)
    assert Path("report/report.md").read_text().count("|") > 20
    assert Path("edit.safetensors").stat().st_size > 10_000


def test_readme_names_uv_beside_both_commands() -> None:
    for name in ("README.md", "README.zh-CN.md"):
        for command in ("uv run hyperlora demo", "uv run pytest"):
            pattern = rf"^{command}\s+# .*pip install uv"
            assert re.search(pattern, (ROOT / name).read_text(), re.MULTILINE), (name, command)


def test_ci_runs_readme_test_command() -> None:
    assert "\nuv run pytest\n" in (ROOT / ".ci/run").read_text()


def test_readme_models_table_equals_script_output() -> None:
    script = [sys.executable, str(ROOT / "docs/scripts/models_table.py")]
    table = subprocess.run(script, capture_output=True, text=True, check=True).stdout.strip()
    for name in ("README.md", "README.zh-CN.md"):
        assert table in (ROOT / name).read_text(), "run docs/scripts/models_table.py --write"


def test_chinese_readme_has_same_blocks() -> None:
    english, chinese = (parse_blocks(ROOT / name) for name in ("README.md", "README.zh-CN.md"))
    assert english == chinese


def test_pages_link_to_existing_files() -> None:
    pages = [ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_sentences_are_short(page: Path) -> None:
    lengths = _count_words_per_sentence(page.read_text())
    assert max(lengths, default=0) <= 35
    assert sum(lengths) <= 17 * len(lengths)


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_names_existing_options(page: Path) -> None:
    """Also commands that are too long to run name files and options that exist."""
    for command in _iter_commands(page):
        program, *arguments = shlex.split(command, comments=True)
        names = [a for a in arguments if a.startswith("--")]
        if program in APPS:
            known = _list_options(program, arguments[0])
            assert known is None or set(names) <= known, command
        elif program == "python" and arguments[0].startswith(("benchmarks/", "docs/")):
            source = (ROOT / arguments[0]).read_text()
            assert all(f'"{name}"' in source for name in names), command
        assert all(
            (ROOT / a).exists() for a in arguments if re.fullmatch(r"configs/\S+\.yaml", a)
        ), command


@pytest.mark.heavy
def test_demo_writes_images_and_loras(tmp_path: Path) -> None:
    hyperlora = str(Path(sys.executable).with_name("hyperlora"))
    subprocess.run([hyperlora, "demo", "--num-subjects", "2"], cwd=tmp_path, check=True)
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"demo.png", "edits.png"} <= names
    assert len([name for name in names if name.endswith(".safetensors")]) == 4


def _iter_commands(page: Path) -> Iterator[str]:
    for block in parse_blocks(page):
        if block.language == "bash":
            for line in block.body.replace("\\\n", " ").splitlines():
                yield from [line.removeprefix("uv run ")] if line.strip() else []


def _list_options(program: str, command: str) -> set[str] | None:
    """List the options of a command; None for one that passes them on."""
    parameters = get_command(APPS[program]).commands[command].params  # type: ignore[attr-defined]
    if command == "train":
        return None
    return {name for p in parameters for name in (*p.opts, *p.secondary_opts)}


def _count_words_per_sentence(text: str) -> list[int]:
    """Count the words of each sentence, without code, tables, headings and images."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(?:\||#|!!!|===|!\[).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text)
    lengths = []
    for paragraph in re.split(r"\n\s*\n|\n\s*(?:[*-]|\d\.) ", text):
        sentences = re.split(r"(?<=[.!?:])\s+(?=[A-Z*`])", " ".join(paragraph.split()))
        lengths += [len(sentence.split()) for sentence in sentences if len(sentence.split()) > 2]
    return lengths
