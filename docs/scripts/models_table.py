"""Make the models table of README from the bundled checkpoints and the tables of results.

python docs/scripts/models_table.py            # prints the table
python docs/scripts/models_table.py --write    # replaces it in README.md and README.zh-CN.md
"""

import argparse
import csv
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUNDLE_DIR = ROOT / "checkpoints" / "avatars"
DATA_DIR = ROOT / "docs" / "results" / "data"
READMES = ("README.md", "README.zh-CN.md")
START, END = "<!-- models table: docs/scripts/models_table.py -->", "<!-- end of models table -->"
TASKS = {
    "image-to-lora": "photo → LoRA",
    "lora-diffusion": "photo → LoRA, sampled",
    "pair-to-lora": "image pair → LoRA",
    "base": "prompt → image",
    "edit-base": "image, instruction → image",
}
HEADER = (
    "| checkpoint | task | base | rank, target modules | parameters, size | score |\n"
    "|---|---|---|---|---|---|"
)


def make_models_table() -> str:
    """Make the table as Markdown, one row per model of the bundle."""
    return "\n".join([HEADER, *(_make_row(name, task) for name, task in TASKS.items())])


def replace_models_table(text: str, table: str) -> str:
    """Replace what stands between the two marker comments of ``text``."""
    pattern = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{START}\n{table}\n{END}", text)


def _make_row(name: str, task: str) -> str:
    folder = BUNDLE_DIR / name
    layout = _read_json(folder / "layout.json")
    weight_files = [p for p in folder.rglob("*.safetensors") if not _is_shared(p)]
    num_parameters = sum(map(_count_parameters, weight_files))
    num_bytes = sum(path.stat().st_size for path in weight_files)
    cells = [
        f"[`avatars/{name}`](checkpoints/avatars/{name})",
        task,
        f"`{layout['base']}`" if layout else "–",
        f"{layout['rank']}, {len(layout['targets'])}" if layout else "–",
        f"{num_parameters / 1e6:.1f} M, {num_bytes / 1e6:.1f} MB",
        _read_score(name),
    ]
    return "| " + " | ".join(cells) + " |"


def _is_shared(path: Path) -> bool:
    """Whether the file belongs to another model and is linked here."""
    return path.resolve() != BUNDLE_DIR.resolve() / path.relative_to(BUNDLE_DIR)


def _count_parameters(path: Path) -> int:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    count = 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = 1
            for length in entry["shape"]:
                size *= length
            count += size
    return count


def _read_score(name: str) -> str:
    if name == "pair-to-lora":
        return f"edit accuracy {_read_cell('edits.csv', 'one pair', 'accuracy')}"
    if name == "edit-base":
        return f"edit accuracy {_read_cell('edits.csv', 'text instruction', 'accuracy')}"
    table = "lora-diffusion-test.csv" if name == "lora-diffusion" else "photo-to-lora.csv"
    lora = "none" if name == "base" else "one photo"
    prompt_accuracy = _read_cell(table, lora, "prompt_accuracy")
    if name == "base":
        return f"prompt accuracy {prompt_accuracy}"
    return f"identity {_read_cell(table, lora, 'identity')}, prompt accuracy {prompt_accuracy}"


def _read_cell(table: str, lora: str, column: str) -> str:
    with (DATA_DIR / table).open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["lora"] == lora)
    return f"{float(row[column]):.2f}"


def _read_json(path: Path) -> dict[str, Any] | None:
    return dict(json.loads(path.read_text())) if path.is_file() else None


def main() -> None:
    """Print the table, or write it into both READMEs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the table in the READMEs")
    table = make_models_table()
    if not parser.parse_args().write:
        print(table)
        return
    for path in (ROOT / name for name in READMES):
        path.write_text(replace_models_table(path.read_text(), table))


if __name__ == "__main__":
    main()
