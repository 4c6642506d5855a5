"""``draw_contact_sheet``: images in a grid with titles."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def draw_contact_sheet(
    column_titles: Sequence[str],
    grid: Sequence[Sequence[Image.Image]],
    cell_size: int = 128,
    row_labels: Sequence[str] = (),
) -> Image.Image:
    """Draw images in a grid with titles, on white.

    Args:
        column_titles: Titles above the columns, wrapped to their width.
        grid: Images, row by row; each is resized to a square.
        cell_size: Side of each image in pixels.
        row_labels: Labels on the left of the rows; none: no label column.

    Returns:
        The sheet.
    """
    font = ImageFont.load_default(size=14)
    gap, max_text_width = 4, cell_size - 8
    title_lines = [_wrap_text(title, font, max_text_width) for title in column_titles]
    header_height = 10 + 17 * max(len(lines) for lines in title_lines)
    label_width = gap + (cell_size if row_labels else 0)
    width = label_width + len(column_titles) * (cell_size + gap)
    height = header_height + len(grid) * (cell_size + gap)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)

    def draw_text(position: tuple[int, int], lines: Sequence[str]) -> None:
        draw.multiline_text(position, "\n".join(lines), fill="#222222", font=font, spacing=2)

    for x, lines in enumerate(title_lines):
        draw_text((label_width + x * (cell_size + gap) + 2, 4), lines)
    for y, label in enumerate(row_labels):
        position = (gap + 2, header_height + y * (cell_size + gap) + 4)
        draw_text(position, _wrap_text(label, font, max_text_width))
    for y, row in enumerate(grid):
        for x, image in enumerate(row):
            position = (label_width + x * (cell_size + gap), header_height + y * (cell_size + gap))
            sheet.paste(image.resize((cell_size, cell_size), Image.Resampling.LANCZOS), position)
    return sheet


def _wrap_text(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, max_width: int
) -> list[str]:
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= max_width or not lines[-1]:
            lines[-1] = candidate
        else:
            lines.append(word)
    return lines
