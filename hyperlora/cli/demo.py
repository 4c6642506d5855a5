"""``hyperlora demo``."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("demo"),
    method: Annotated[str, typer.Option(help="hyperdreambooth or difflora.")] = "hyperdreambooth",
    people: Annotated[int, typer.Option(min=1, help="How many people never seen in training.")] = 6,
) -> None:
    """Portraits of people never seen in training, from one photo each: pictures, LoRA files, seconds and scores."""
    import time

    import torch

    from hyperlora import pretrained
    from hyperlora.cli.options import require_folder
    from hyperlora.cpu import keep_heap
    from hyperlora.data.images import to_image
    from hyperlora.diffusion.diffusion_base import load_base
    from hyperlora.encoders.attribute_classifier import Reader
    from hyperlora.evaluation.benchmark import load_benchmark
    from hyperlora.evaluation.report import contact_sheet
    from hyperlora.evaluation.subject_evaluator import Judge
    from hyperlora.lora.io.load import load_lora
    from hyperlora.lora.io.metadata import LoraHeader
    from hyperlora.lora.io.save import save_lora
    from hyperlora.lora.weights import LoraWeights
    from hyperlora.pipelines.auto import open_photo_model

    require_folder(out)
    keep_heap()
    base = load_base(pretrained.BASE)
    model = open_photo_model(method=method, base=base)
    benchmark = load_benchmark(pretrained.BENCHMARK, base.resolution, people)
    judge = Judge(base, Reader.from_pretrained(pretrained.EVALUATOR), benchmark)
    model.forward(benchmark.photos[:1, :1])  # warm up, so that the time told is a second photo's

    began = time.perf_counter()
    lora = LoraWeights.stack([model.forward(p[None, :1])[0] for p in benchmark.photos])
    seconds = (time.perf_counter() - began) / len(lora)
    out.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(benchmark.names):
        header = LoraHeader(title=name, architecture=base.architecture, trigger_phrase="sks person")
        save_lora(lora[i], out / f"{name}.safetensors", header=header)
        save_lora(lora[i], out / f"{name}.kohya.safetensors", format="kohya", header=header)

    rows = {"without LoRA": judge.row("without LoRA", None, None), "LoRA from one photo": judge.row("with LoRA", lora)}
    stored = [pretrained.BENCHMARK / "fitted" / f"{name}.safetensors" for name in benchmark.names]
    if all(file.is_file() for file in stored):
        fitted = LoraWeights.stack([load_lora(file, model.layout).weights for file in stored])
        rows["LoRA fitted to it"] = judge.row("fitted", fitted)
    plain, ours, *best = rows.values()
    shown = range(min(5, len(benchmark.prompts)))
    titles = ["photo", "same prompt, no LoRA", *(_short(benchmark.prompts[p].prompt) for p in shown)]
    grid = [
        [to_image(benchmark.photos[s, 0]), plain.images[s][0], *(ours.images[s][p] for p in shown)]
        + [row.images[s][0] for row in best]
        for s in range(len(lora))
    ]
    contact_sheet([*titles, *(["LoRA fitted to the photo"] if best else [])], grid, cell=160).save(out / "demo.png")

    from rich.console import Console
    from rich.table import Table

    table = Table("", "identity I", "prompt P", title=f"{len(lora)} people never seen in training")
    for name, row in rows.items():
        table.add_row(name, str(row.identity), str(row.prompt or "–"))
    Console().print(table)
    typer.echo(f"{seconds * 1000:.0f} ms from photo to LoRA on {torch.get_num_threads()} threads")
    typer.echo(f"pictures: {out / 'demo.png'}; LoRA files (diffusers and kohya): {out}")
    _edits(out)


def _edits(out: Path) -> None:
    """``edits.png``: one edit of every kind shown by a pair, on three people never seen in training, and undone."""
    from hyperlora import pretrained
    from hyperlora.data.images import pixels_of, to_image
    from hyperlora.diffusion.diffusion_base import load_base
    from hyperlora.diffusion.image_editing import apply_edit, kept
    from hyperlora.encoders.attribute_classifier import Reader
    from hyperlora.evaluation.edit_benchmark import load_edit_benchmark
    from hyperlora.evaluation.edit_evaluator import EditJudge
    from hyperlora.evaluation.edit_suite import pair_loras
    from hyperlora.evaluation.report import contact_sheet
    from hyperlora.lora.io.metadata import LoraHeader
    from hyperlora.lora.io.save import save_lora
    from hyperlora.pipelines.pair_to_lora import PairToLora

    base = load_base(pretrained.EDIT_BASE)
    model = PairToLora.from_pretrained(pretrained.PAIR_MODEL, base=base)
    benchmark = load_edit_benchmark(pretrained.EDIT_BENCHMARK, base.resolution)
    judge = EditJudge(base, Reader.from_pretrained(pretrained.EVALUATOR), benchmark, steps=model.steps)
    pair_loras(model, benchmark, 1)  # warm up
    _, seconds = pair_loras(model, benchmark, 1)
    lora, longer = pair_loras(model, benchmark, 1, base=base)
    repainted = judge.edited("edits", lora, judge.before)
    nothing = judge.edited("asked for nothing", None, judge.before)
    row = judge.scored("edits", kept(judge.before, repainted, nothing))
    firsts = [sum(len(e.others) for e in benchmark.edits[:i]) for i in range(len(benchmark.edits))]
    turned, _ = pair_loras(model, benchmark, 1, turned=True, base=base)
    edited, seeds = row.pictures[firsts], [0] * len(firsts)
    back = pixels_of(apply_edit(base, edited, turned, seeds=seeds, steps=judge.steps, keep_rest=True))
    grid = []
    for i, (edit, first) in enumerate(zip(benchmark.edits, firsts, strict=True)):
        header = LoraHeader(title=edit.name, architecture=base.architecture)
        save_lora(lora[i], out / "edits" / f"{edit.name}.safetensors", header=header)
        pictures = [edit.shown[0, 0], edit.shown[0, 1]]
        for j, other in enumerate(edit.others[:3]):
            pictures += [other[0], row.pictures[first + j]]
        grid.append([to_image(x) for x in (*pictures, back[i])])
    people = [title for n in range(3) for title in (f"person {n + 1}", "edited alike")]
    contact_sheet(["before", "after", *people, "undone again"], grid).save(out / "edits.png")
    for group in benchmark.groups:
        right, rest = row.score("accuracy", group), row.score("preservation", group)
        typer.echo(f"edits, {group}: right {right}, the rest kept {rest}")
    typer.echo(f"{seconds * 1000:.0f} ms from a pair to a LoRA, {longer * 1000:.0f} with further words tried")
    typer.echo(f"pictures: {out / 'edits.png'}; LoRA files: {out / 'edits'}")


def _short(prompt: str) -> str:
    """The part of a prompt after who it is about."""
    return prompt.split(", ", 1)[-1]
