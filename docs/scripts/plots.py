"""Draw the plots of the results pages from the tables in ``docs/results/data``.

python docs/scripts/plots.py                              # writes docs/results/plots/*.svg
python docs/scripts/plots.py --output-dir /tmp --format png
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS_DIR = Path(__file__).parents[1]
DATA_DIR = DOCS_DIR / "results" / "data"
BLUE, ORANGE, GREEN, PURPLE, GRAY = "#2563eb", "#ea580c", "#15803d", "#7c3aed", "#6b7280"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "hyperlora",
}


def read_table(name: str) -> list[dict[str, str]]:
    """Read ``name`` of the data folder as one dictionary per row."""
    with (DATA_DIR / name).open(newline="") as file:
        return list(csv.DictReader(file))


def plot_identity_and_prompt() -> Figure:
    """Identity against prompt accuracy of one photo's LoRA, with the controls."""
    figure, axes = plt.subplots(figsize=(6, 3.6))
    rows = {row["lora"]: row for row in read_table("photo-to-lora.csv")}
    path = ["one photo, strength 0.6", "one photo, strength 0.8", "one photo"]
    points = [_read_point(rows[name], "identity", "prompt_accuracy") for name in path]
    axes.plot([p[0] for p in points], [p[1] for p in points], "-", color=BLUE, alpha=0.5)
    labels = {
        "one photo, strength 0.6": ("strength 0.6", BLUE, "o", (-70, 2)),
        "one photo, strength 0.8": ("strength 0.8", BLUE, "o", (-58, -13)),
        "one photo": ("one photo, strength 1", BLUE, "o", (-112, -14)),
        "four photos": ("four photos", GREEN, "s", (6, -12)),
        "none": ("no LoRA", GRAY, "X", (8, -11)),
        "mean LoRA": ("mean LoRA", GRAY, "X", (8, 5)),
        "another subject's LoRA": ("another subject's LoRA", GRAY, "X", (8, -3)),
    }
    for name, (label, color, marker, offset) in labels.items():
        x, y, x_error, y_error = _read_point(rows[name], "identity", "prompt_accuracy")
        axes.errorbar(x, y, y_error, x_error, marker=marker, color=color, ms=6, elinewidth=0.8)
        axes.annotate(label, (x, y), offset, textcoords="offset points", color=color)
    axes.axvline(0.8, color=ORANGE, lw=1, ls="--")
    axes.annotate(
        "target 0.80", (0.8, 0.8965), (-4, 0), textcoords="offset points", color=ORANGE, ha="right"
    )
    axes.set(xlabel="identity score →", ylabel="prompt accuracy →", xlim=(-0.1, 0.98))
    axes.set_ylim(0.853, 0.899)
    return figure


def plot_quality_and_time() -> Figure:
    """Identity against seconds per LoRA: one pass, refinement, fine-tuning."""
    figure, axes = plt.subplots(figsize=(6, 3.2))
    refined = {row["lora"]: row for row in read_table("photo-to-lora-refined.csv")}
    finetuned = {row["lora"]: row for row in read_table("photo-to-lora-finetuned.csv")}
    points = [
        (refined["one photo"], "one photo, one pass", BLUE, (8, -12), "left"),
        (refined["four photos"], "four photos, one pass", GREEN, (8, 4), "left"),
        (refined["one photo, refined 40 steps"], "refined, 40 steps", BLUE, (-8, -12), "right"),
        (
            finetuned["fine-tuned per subject, 200 steps"],
            "fine-tuned, 200 steps",
            ORANGE,
            (-8, 4),
            "right",
        ),
    ]
    for row, label, color, offset, align in points:
        x, y, error = float(row["seconds_per_lora"]), float(row["identity"]), row["identity_se"]
        axes.errorbar(x, y, float(error), marker="o", color=color, ms=6, elinewidth=0.8)
        axes.annotate(label, (x, y), offset, textcoords="offset points", color=color, ha=align)
    axes.set_xscale("log")
    axes.set(xlabel="seconds per LoRA (one busy CPU core) ←", ylabel="identity score →")
    axes.set(ylim=(0, 0.95), xlim=(0.01, 100))
    return figure


def plot_edit_accuracy() -> Figure:
    """Accuracy of each kind of edit: text instruction, one pair, one pair with search."""
    rows = read_table("edits-by-kind.csv")
    figure, axes = plt.subplots(figsize=(6.4, 7))
    series = [
        ("target through the autoencoder", "ceiling: drawn target", GRAY, "|", 0.0, 160),
        ("text instruction", "text instruction", ORANGE, "s", 0.27, 26),
        ("one pair", "one pair", BLUE, "o", 0.0, 28),
        ("one pair, instruction search", "one pair, instruction search", GREEN, "^", -0.27, 30),
    ]
    for column, label, color, marker, offset, size in series:
        x = [float(row[column]) for row in rows]
        y = [len(rows) - i + offset for i in range(len(rows))]
        axes.scatter(x, y, s=size, color=color, marker=marker, label=label, alpha=0.9, zorder=3)
    axes.set_yticks([len(rows) - i for i in range(len(rows))], [row["edit"] for row in rows])
    axes.set(xlabel="accuracy → (9 images per edit)", xlim=(-0.04, 1.06))
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, 1.09), ncols=2, fontsize=8)
    return figure


def plot_sliders() -> Figure:
    """Probability of the edited attribute at strengths from -2 to 2, by method."""
    rows = read_table("sliders.csv")
    edits = list(dict.fromkeys(row["edit"] for row in rows))
    figure, grid = plt.subplots(2, 3, figsize=(7, 4), sharex=True, sharey=True)
    colors = {"differential LoRA": BLUE, "fine-tuned on pairs": ORANGE, "pair hypernetwork": GREEN}
    strengths = [-2, -1, 0, 1, 2]
    for axes, edit in zip(grid.flat, edits, strict=True):
        for row in (row for row in rows if row["edit"] == edit):
            values = [float(row[f"probability_{s}"]) for s in strengths]
            label = row["method"] if axes is grid.flat[0] else None
            axes.plot(strengths, values, "o-", ms=3, color=colors[row["method"]], label=label)
        axes.set_title(edit, fontsize=9)
        axes.set_xticks(strengths)
    for axes in grid[1]:
        axes.set_xlabel("strength")
    for axes in grid[:, 0]:
        axes.set_ylabel("probability")
    figure.legend(loc="lower center", ncols=3, bbox_to_anchor=(0.5, -0.09))
    return figure


def plot_speed() -> Figure:
    """Measured speed-ups beside their targets, on a log axis."""
    rows = read_table("speed.csv")[::-1]
    figure, axes = plt.subplots(figsize=(6.8, 3.2))
    measured = [float(row["measured_ratio"]) for row in rows]
    targets = [float(row["target_ratio"]) for row in rows]
    axes.barh(range(len(rows)), measured, color=BLUE, height=0.6, label="measured")
    axes.scatter(targets, range(len(rows)), marker="|", s=220, color=ORANGE, lw=2, label="target")
    for i, value in enumerate(measured):
        axes.annotate(f"{value:,g}×", (value, i), (5, -3), textcoords="offset points")
    axes.set_yticks(range(len(rows)), [row["claim"] for row in rows])
    axes.set_xscale("log")
    axes.set(xlabel="speed-up →", xlim=(1, 60000))
    axes.legend(loc="lower right")
    axes.grid(axis="y", visible=False)
    return figure


def plot_composition() -> Figure:
    """Identity and concept accuracy of the four strategies by the number of LoRAs."""
    rows = read_table("composition-strategies.csv")
    figure, grid = plt.subplots(1, 2, figsize=(7, 3), sharey=True)
    colors = {"merge": BLUE, "switch": ORANGE, "composite": GREEN, "spatial": PURPLE}
    for axes, column, title in (
        (grid[0], "identity", "identity score of the person"),
        (grid[1], "concept_accuracy", "accuracy of the other concepts"),
    ):
        for strategy, color in colors.items():
            chosen = [row for row in rows if row["strategy"] == strategy]
            x = [int(row["num_loras"]) for row in chosen]
            y = [float(row[column]) for row in chosen]
            error = [float(row[f"{column}_se"]) for row in chosen]
            axes.errorbar(
                x, y, error, marker="o", ms=4, color=color, label=strategy, elinewidth=0.8
            )
        axes.set_title(title, fontsize=9)
        axes.set(xlabel="LoRAs in one image", xticks=[2, 3, 4, 5], ylim=(0, 1.05))
    grid[0].legend(fontsize=8, loc="lower left")
    return figure


def plot_hypernetworks() -> Figure:
    """Identity of five hypernetworks after 1,000 steps, as predicted and refined."""
    rows = [row for row in read_table("hypernetwork-comparison.csv") if row["identity_refined"]]
    figure, axes = plt.subplots(figsize=(6.4, 2.8))
    for i, row in enumerate(rows[::-1]):
        for column, color, offset, label in (
            ("identity", BLUE, 0.12, "as predicted"),
            ("identity_refined", GREEN, -0.12, "refined, 40 steps"),
        ):
            _plot_dot(axes, row, column, i + offset, color, label if i == 0 else None)
    axes.axvline(0.235, color=ORANGE, ls="--", lw=1)
    axes.annotate(
        "LoRA fine-tuned\non the photo",
        (0.235, 3.9),
        (4, 0),
        textcoords="offset points",
        color=ORANGE,
        va="top",
        fontsize=8,
    )
    axes.set_yticks(range(len(rows)), [row["hypernetwork"] for row in rows[::-1]])
    axes.set(xlabel="identity score → (16 test people)", xlim=(0.2, 0.7), ylim=(-0.6, 4.6))
    axes.legend(fontsize=8, loc="lower left")
    return figure


def plot_lora_diffusion() -> Figure:
    """Identity of sampled LoRAs by the number of sampling steps, beside other LoRAs."""
    rows = {row["lora"]: row for row in read_table("lora-diffusion.csv")}
    figure, axes = plt.subplots(figsize=(6, 3))
    steps = [1, 4, 10, 50]
    names = ["LoRA diffusion, 1 step", *(f"LoRA diffusion, {n} steps" for n in steps[1:])]
    axes.errorbar(
        steps,
        [float(rows[name]["identity"]) for name in names],
        [float(rows[name]["identity_se"]) for name in names],
        marker="o",
        color=BLUE,
        label="LoRA diffusion, one photo",
    )
    for name, label, color in (
        ("fine-tuned, eight portraits", "fine-tuned, eight portraits (the training data)", GREEN),
        ("PCA per factor (8), then 128 (released)", "the same through the codec", PURPLE),
        ("hypernetwork, one photo", "hypernetwork, one photo", ORANGE),
    ):
        axes.axhline(float(rows[name]["identity"]), color=color, ls="--", lw=1, label=label)
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.minorticks_off()
    axes.set(xlabel="sampling steps", ylabel="identity score →", ylim=(0.74, 0.9))
    axes.legend(fontsize=8, loc="lower center", ncols=2)
    return figure


def plot_autolora() -> Figure:
    """Identity against diversity for AutoLoRA guidance at three guidance scales."""
    rows = read_table("autolora.csv")
    figure, axes = plt.subplots(figsize=(6, 3.2))
    for scale, color in (("1.5", BLUE), ("3", GREEN), ("5", ORANGE)):
        chosen = [row for row in rows if row["guidance_scale"] == scale]
        x = [float(row["identity"]) for row in chosen]
        y = [float(row["diversity"]) for row in chosen]
        axes.plot(x, y, "o-", color=color, ms=4, label=f"guidance scale {scale}")
        if scale == "1.5":
            for row, px, py in zip(chosen, x, y, strict=True):
                offset = (-4, 7) if float(row["gamma"]) < 1 else (7, -3)
                label = f"γ = {row['gamma']}"
                axes.annotate(label, (px, py), offset, textcoords="offset points", fontsize=8)
    axes.set(xlabel="identity score →", ylabel="diversity of four seeds →")
    axes.set(xlim=(0, 1), ylim=(0.31, 0.415))
    axes.legend(fontsize=8, loc="lower left")
    return figure


PLOTS: dict[str, Callable[[], Figure]] = {
    "identity-and-prompt": plot_identity_and_prompt,
    "quality-and-time": plot_quality_and_time,
    "edit-accuracy": plot_edit_accuracy,
    "sliders": plot_sliders,
    "speed": plot_speed,
    "composition": plot_composition,
    "hypernetworks": plot_hypernetworks,
    "lora-diffusion": plot_lora_diffusion,
    "autolora": plot_autolora,
}


def _read_point(row: dict[str, str], x: str, y: str) -> tuple[float, float, float, float]:
    return float(row[x]), float(row[y]), float(row[f"{x}_se"]), float(row[f"{y}_se"])


def _plot_dot(
    axes: Axes, row: dict[str, str], column: str, y: float, color: str, label: str | None
) -> None:
    error = float(row[f"{column}_se"])
    axes.errorbar(
        float(row[column]),
        y,
        xerr=error,
        marker="o",
        ms=5,
        color=color,
        label=label,
        ls="none",
        elinewidth=0.8,
    )


def main() -> None:
    """Draw every plot of the results pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=DOCS_DIR / "results" / "plots")
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if arguments.format == "svg" else {}
    with plt.rc_context(STYLE):
        for name, plot in PLOTS.items():
            path = arguments.output_dir / f"{name}.{arguments.format}"
            figure = plot()
            figure.savefig(path, bbox_inches="tight", dpi=120, metadata=metadata)
            plt.close(figure)
            print(path)


if __name__ == "__main__":
    main()
