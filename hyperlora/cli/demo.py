"""``hyperlora demo``."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("demo"),
    people: Annotated[int, typer.Option(min=1, help="How many people never seen in training.")] = 6,
) -> None:
    """Portraits of people never seen in training, from one photo each: pictures, LoRA files, seconds and scores."""
    import time

    import torch

    from hyperlora import bundle
    from hyperlora.cli.output import require_folder
    from hyperlora.data import to_image
    from hyperlora.encoders import Reader
    from hyperlora.evaluation.benchmark import load_benchmark
    from hyperlora.evaluation.personalisation import Judge
    from hyperlora.evaluation.report import contact_sheet
    from hyperlora.formats import LoraHeader, load_lora, save_lora
    from hyperlora.heap import keep_heap
    from hyperlora.lora import LoraWeights
    from hyperlora.pipelines import ImageToLora, load_base

    require_folder(out)
    keep_heap()
    base = load_base(bundle.BASE)
    model = ImageToLora.from_pretrained(bundle.MODEL, base=base)
    benchmark = load_benchmark(bundle.BENCHMARK, base.resolution, people)
    judge = Judge(base, Reader.from_pretrained(bundle.EVALUATOR), benchmark)
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
    stored = [bundle.BENCHMARK / "fitted" / f"{name}.safetensors" for name in benchmark.names]
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


def _short(prompt: str) -> str:
    """The part of a prompt after who it is about."""
    return prompt.split(", ", 1)[-1]
