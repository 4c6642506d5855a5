"""``hyperlora evaluate``."""

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    subjects: Annotated[Path | None, typer.Argument(help="Benchmark, or any folder of subjects.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of an ImageToLora model.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model: folder or hub id.")] = None,
    evaluator: Annotated[Path | None, typer.Option(help="Folder of the evaluator network.")] = None,
    people: Annotated[int | None, typer.Option(min=1, help="Only the first so many subjects.")] = None,
    refine: Annotated[int, typer.Option(min=0, help="Also refined with so many steps.")] = 0,
    fit: Annotated[int, typer.Option(min=0, help="Also LoRAs fitted per subject, so many steps.")] = 0,
    fit_lr: Annotated[float, typer.Option(help="Learning rate of those.")] = 1e-3,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps per picture.")] = 20,
    guidance: Annotated[float, typer.Option(min=0, max=100)] = 3.0,
    report: Annotated[Path | None, typer.Option(help="Folder for the table, pictures and plot.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable result.")] = False,
) -> None:
    """Identity and prompt scores of a model on unseen subjects, with every control."""
    from rich.console import Console
    from rich.markdown import Markdown

    from hyperlora import bundle
    from hyperlora.cli.output import require_folder
    from hyperlora.encoders import Reader
    from hyperlora.evaluation.benchmark import load_benchmark
    from hyperlora.evaluation.personalisation import Judge
    from hyperlora.evaluation.report import as_json as rows_as_json
    from hyperlora.evaluation.report import markdown, write_report
    from hyperlora.evaluation.table import FitSettings, rows
    from hyperlora.heap import keep_heap
    from hyperlora.pipelines import ImageToLora, load_base

    if report is not None:
        require_folder(report)
    keep_heap()
    frozen = load_base(base or bundle.BASE)
    network = ImageToLora.from_pretrained(model or bundle.MODEL, base=frozen)
    network.layout.require_base(frozen.id)
    benchmark = load_benchmark(subjects or bundle.BENCHMARK, frozen.resolution, people)
    judge = Judge(frozen, Reader.from_pretrained(evaluator or bundle.EVALUATOR), benchmark, steps, guidance)
    fitting = FitSettings(steps=fit, lr=fit_lr) if fit else None
    table = list(rows(judge, network, refine_steps=refine, fitting=fitting))
    if report is not None:
        from hyperlora.data import to_image

        write_report(report, table, [to_image(p) for p in benchmark.photos[:, 0]])
    if as_json:
        typer.echo(json.dumps({"people": len(benchmark.names), "rows": rows_as_json(table)}))
        return
    Console().print(Markdown(markdown(table)))
    if not benchmark.has_truth:
        typer.echo("P needs prompts with known truth (prompts.json with truth): left out")
    if benchmark.others.shape[1] < 2:
        typer.echo("I has no second real photo to compare with: 1 means an identical embedding")
