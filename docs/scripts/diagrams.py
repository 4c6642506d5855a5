"""Draw the diagrams of the concept pages: ``python docs/scripts/diagrams.py``."""

from pathlib import Path
from xml.sax.saxutils import escape

IMAGE_DIR = Path(__file__).parents[1] / "images"
BLUE, GREEN, ORANGE, GRAY = "#dbeafe", "#dcfce7", "#ffedd5", "#f3f4f6"
INK, LINE = "#111827", "#6b7280"


def format_text(x: float, y: float, text: str, size: int = 13, bold: bool = False) -> str:
    """Format one centered line of text."""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="middle" fill="{INK}"{weight}>'
        f"{escape(text)}</text>"
    )


def format_box(
    x: float, y: float, width: float, height: float, lines: list[str], fill: str = BLUE
) -> str:
    """Format a rounded box; the first line is bold."""
    parts = [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}"'
        f' stroke="{LINE}"/>'
    ]
    top = y + height / 2 - 8 * (len(lines) - 1) + 4
    for i, line in enumerate(lines):
        size = 13 if i == 0 else 11
        parts.append(format_text(x + width / 2, top + 17 * i, line, size, bold=i == 0))
    return "".join(parts)


def format_arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """Format a straight arrow."""
    return (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{LINE}"'
        f' stroke-width="1.5" marker-end="url(#head)"/>'
    )


def format_svg(width: int, height: int, parts: list[str]) -> str:
    """Format a whole SVG file with a white background."""
    head = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7"'
        f' markerHeight="7" orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="{LINE}"/></marker>'
        "</defs>"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" font-family="DejaVu Sans, Helvetica, Arial, sans-serif">\n{head}\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def draw_data_flow() -> str:
    """Draw the way from photos or a pair to a file, an image or a loss."""
    parts = [
        format_box(10, 30, 110, 44, ["photos", "one subject"], GRAY),
        format_box(10, 96, 110, 44, ["image pair", "before, after"], GRAY),
        format_arrow(120, 52, 158, 76),
        format_arrow(120, 118, 158, 94),
        format_box(160, 60, 120, 50, ["encoders/", "ViT, ResNet, face"]),
        format_arrow(280, 85, 318, 85),
        format_box(320, 55, 130, 60, ["ImageFeatures", "[batch, views,", "tokens, width]"], GREEN),
        format_arrow(450, 85, 488, 85),
        format_box(490, 60, 120, 50, ["models/", "hypernetworks"]),
        format_arrow(610, 85, 648, 85),
        format_box(
            650, 50, 140, 70, ["LoraWeights", "down [batch, r, in]", "up [batch, out, r]"], GREEN
        ),
        format_box(650, 160, 140, 44, ["LoraLayout", "which modules, rank"], GREEN),
        format_arrow(720, 160, 720, 122),
        format_arrow(790, 85, 838, 35),
        format_arrow(790, 85, 838, 100),
        format_arrow(790, 85, 838, 165),
        format_box(840, 10, 150, 50, ["lora/io/", ".safetensors file"], ORANGE),
        format_box(840, 75, 150, 50, ["diffusion/", "images with the LoRA"], ORANGE),
        format_box(840, 140, 150, 50, ["training/", "loss through the base"], ORANGE),
        format_box(
            10,
            160,
            440,
            44,
            ["data_builder/", "subjects → LoRAs, fine-tuned many at a time → a dataset of LoRAs"],
            GRAY,
        ),
        format_arrow(450, 176, 648, 112),
    ]
    return format_svg(1000, 215, parts)


def draw_layers() -> str:
    """Draw the layers of the library; a row imports only rows below it."""
    rows = [
        (["cli"], ORANGE),
        (["service", "evaluation", "training"], ORANGE),
        (["pipelines"], BLUE),
        (["finetuning"], BLUE),
        (["diffusion"], BLUE),
        (["data", "encoders", "models"], GREEN),
        (["lora", "features"], GREEN),
        (["progress", "compute", "pretrained", "client"], GRAY),
        (["errors"], GRAY),
    ]
    notes = [
        "commands",
        "what runs the pipelines",
        "what users call: ImageToLora, PairToLora",
        "LoRAs by gradient descent",
        "a base model with LoRAs on it (diffusers)",
        "images → features → weights (torch, timm)",
        "what a LoRA is (torch, safetensors)",
        "small helpers, such as device and precision",
        "one sentence per error",
    ]
    parts = []
    for i, ((names, color), note) in enumerate(zip(rows, notes, strict=True)):
        y, width = 10 + 42 * i, 500 / len(names)
        for j, name in enumerate(names):
            parts.append(format_box(10 + width * j, y, width - 6, 34, [name], color))
        parts.append(
            f'<text x="520" y="{y + 21}" font-size="12" fill="{INK}">{escape(note)}</text>'
        )
    return format_svg(830, 396, parts)


def draw_lora_algebra() -> str:
    """Draw ΔW as the product of up and down, and the basis head that makes them."""
    parts = [
        format_box(20, 60, 120, 120, ["W + ΔW", "[out, in]"], GRAY),
        format_text(165, 125, "=", 18),
        format_box(190, 60, 120, 120, ["W", "frozen", "[out, in]"], GRAY),
        format_text(335, 125, "+", 18),
        format_box(360, 60, 40, 120, ["up"], BLUE),
        format_text(380, 200, "[out, r]", 11),
        format_text(418, 125, "·", 18),
        format_box(436, 60, 120, 40, ["down"], GREEN),
        format_text(496, 118, "[r, in]", 11),
        format_text(380, 40, "up = Σ c′ᵢ Uᵢ", 12),
        format_text(500, 40, "down = D₀ + Σ cᵢ Dᵢ", 12),
        format_box(640, 60, 190, 52, ["codes c, c′", "[batch, targets, size]"], ORANGE),
        format_box(640, 136, 190, 52, ["hypernetwork", "predicts them from photos"], BLUE),
        format_arrow(735, 136, 735, 114),
        format_arrow(640, 86, 558, 80),
    ]
    return format_svg(850, 215, parts)


def main() -> None:
    """Write the three diagrams."""
    for name, draw in (
        ("data-flow", draw_data_flow),
        ("layers", draw_layers),
        ("lora-algebra", draw_lora_algebra),
    ):
        (IMAGE_DIR / f"{name}.svg").write_text(draw())


if __name__ == "__main__":
    main()
