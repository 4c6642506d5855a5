"""Draw the two sheets of README from the folder that ``hyperlora demo`` writes.

hyperlora demo -o /tmp/demo && python docs/scripts/sheets.py /tmp/demo

The images are those of the demo; the titles are shorter and larger.
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from hyperlora import pretrained

IMAGE_DIR = Path(__file__).parents[1] / "images"
GAP = 4
NUM_EDITS = 10
"""Rows of ``edits.png``: one edit of each of the first ten kinds."""


def read_grid(path: Path, cell_size: int) -> list[list[Image.Image]]:
    """Read the images of a contact sheet, row by row; titles stand above them."""
    sheet = Image.open(path).convert("RGB")
    step = cell_size + GAP
    header_height = sheet.height % step
    return [
        [
            sheet.crop((x + GAP, y, x + GAP + cell_size, y + cell_size))
            for x in range(0, sheet.width - step + 1, step)
        ]
        for y in range(header_height, sheet.height - step + 1, step)
    ]


def draw_sheet(
    titles: list[str], grid: list[list[Image.Image]], row_labels: list[str], font_size: int
) -> Image.Image:
    """Draw a grid with titles above the columns and labels left of the rows, if there are any."""
    font = ImageFont.load_default(size=font_size)
    cell_size = grid[0][0].width
    step, line_height = cell_size + GAP, font_size + 4
    label_width = cell_size if row_labels else 0
    header_height = 8 + line_height * max(title.count("\n") + 1 for title in titles)
    size = (label_width + step * len(titles), header_height + step * len(grid))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.multiline_text((label_width + column * step, 2), title, "#222222", font, spacing=4)
    for row, images in enumerate(grid):
        y = header_height + row * step
        if row_labels:
            draw.text((2, y + cell_size // 2), row_labels[row], "#222222", font, anchor="lm")
        for column, image in enumerate(images):
            sheet.paste(image, (label_width + column * step, y))
    return sheet


def draw_subjects(demo_dir: Path) -> Image.Image:
    """Draw a row per person: the photo, the base alone, and five prompts with the LoRA."""
    prompts = json.loads((pretrained.BENCHMARK_DIR / "prompts.json").read_text())
    titles = ["photo", "no LoRA"]
    for truth in (prompt["truth"] for prompt in prompts[:5]):
        titles.append(f"{truth['expression']},\n{truth['garment_color']} {truth['garment']}")
    return draw_sheet(titles, read_grid(demo_dir / "demo.png", 160), [], 18)


def draw_edits(demo_dir: Path) -> Image.Image:
    """Draw a row per edit: the pair, three people with their edits, and the first edit undone."""
    edits = json.loads((pretrained.EDIT_BENCHMARK_DIR / "edits.json").read_text())[:NUM_EDITS]
    titles = ["before", "after"]
    for number in (1, 2, 3):
        titles += [f"person {number}", "edited"]
    labels = [edit["kind"].replace("_", " ") for edit in edits]
    grid = read_grid(demo_dir / "edits.png", 128)[:NUM_EDITS]
    return draw_sheet([*titles, "edit undone"], grid, labels, 18)


def main() -> None:
    """Write ``docs/images/demo.png`` and ``docs/images/edits.png``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo_dir", type=Path, help="folder that `hyperlora demo` wrote")
    demo_dir = parser.parse_args().demo_dir
    draw_subjects(demo_dir).save(IMAGE_DIR / "demo.png", optimize=True)
    draw_edits(demo_dir).save(IMAGE_DIR / "edits.png", optimize=True)


if __name__ == "__main__":
    main()
