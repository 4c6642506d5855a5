"""``hyperlora evaluate``."""

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    subjects: Annotated[Path | None, typer.Argument(help="Benchmark, or any folder of subjects or pairs.")] = None,
    task: Annotated[str, typer.Option(help="portrait (LoRAs from photos) or edit (from pairs).")] = "portrait",
    method: Annotated[str | None, typer.Option(help="hyperdreambooth or difflora: whose model of the bundle.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a model of either (or a PairToLora).")] = None,
    base: Annotated[str | None, typer.Option(help="Base model: folder or hub id.")] = None,
    evaluator: Annotated[Path | None, typer.Option(help="Folder of the evaluator network.")] = None,
    people: Annotated[int | None, typer.Option(min=1, help="Only so many subjects (edits per group).")] = None,
    refine: Annotated[int, typer.Option(min=0, help="Also refined with so many steps.")] = 0,
    fit: Annotated[int, typer.Option(min=0, help="Also LoRAs fitted per subject, so many steps.")] = 0,
    fit_lr: Annotated[float, typer.Option(help="Learning rate of those.")] = 1e-3,
    best_of: Annotated[int, typer.Option(min=1, help="Also the likest of so many samples (difflora).")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the first person's sample; then + 1 (difflora).")] = 0,
    sampling_steps: Annotated[int | None, typer.Option(min=1, help="Of the diffusion over LoRAs.")] = None,
    sampling_guidance: Annotated[float | None, typer.Option(min=0, max=100, help="By the photos, likewise.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; 20, or the pair model's own.")] = None,
    guidance: Annotated[float, typer.Option(min=0, max=100)] = 3.0,
    report: Annotated[Path | None, typer.Option(help="Folder for the table, pictures and plot.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable result.")] = False,
) -> None:
    """Scores of a model on unseen people, with every control: identity and prompt, or accuracy and preservation."""
    from hyperlora.cli.options import require_folder
    from hyperlora.errors import BadRequest

    if task not in ("portrait", "edit"):
        raise BadRequest(f"unknown task {task!r}; known: portrait, edit")
    if report is not None:
        require_folder(report)
    if task == "edit":
        _edits(subjects, model, base, evaluator, people, fit, fit_lr, steps, report, as_json)
        return

    from rich.console import Console
    from rich.markdown import Markdown

    from hyperlora import pretrained
    from hyperlora.cpu import keep_heap
    from hyperlora.diffusion.diffusion_base import load_base
    from hyperlora.encoders.attribute_classifier import Reader
    from hyperlora.encoders.identity_similarity import Likeness
    from hyperlora.evaluation.benchmark import load_benchmark
    from hyperlora.evaluation.report import as_json as rows_as_json
    from hyperlora.evaluation.report import markdown, write_report
    from hyperlora.evaluation.subject_evaluator import Judge
    from hyperlora.evaluation.subject_suite import FitSettings, rows
    from hyperlora.pipelines.auto import open_photo_model
    from hyperlora.pipelines.generate import Settings, check
    from hyperlora.pipelines.image_to_lora_base import Sampling
    from hyperlora.pipelines.rerank import Chooser, portraits_of

    keep_heap()
    frozen = load_base(base or pretrained.BASE)
    network = open_photo_model(model, method, frozen)
    network.layout.require_base(frozen.id)
    benchmark = load_benchmark(subjects or pretrained.BENCHMARK, frozen.resolution, people)
    judge = Judge(frozen, Reader.from_pretrained(evaluator or pretrained.EVALUATOR), benchmark, steps or 20, guidance)
    fitting = FitSettings(steps=fit, lr=fit_lr) if fit else None
    sampling = Sampling(seed, sampling_steps, sampling_guidance)
    check(network, Settings(sampling=sampling, best_of=best_of))
    chooser = None
    if best_of > 1:
        likeness = Likeness.from_pretrained(evaluator or pretrained.EVALUATOR)
        chooser = Chooser(frozen, likeness, portraits_of(network.trigger))
    table = list(
        rows(
            judge, network, refine_steps=refine, fitting=fitting, sampling=sampling, best_of=best_of, chooser=chooser
        )
    )  # fmt: skip
    if report is not None:
        from hyperlora.data.images import to_image

        write_report(report, table, [to_image(p) for p in benchmark.photos[:, 0]])
    if as_json:
        typer.echo(json.dumps({"people": len(benchmark.names), "rows": rows_as_json(table)}))
        return
    Console().print(Markdown(markdown(table)))
    if not benchmark.has_truth:
        typer.echo("P needs prompts with known truth (prompts.json with truth): left out")
    if benchmark.others.shape[1] < 2:
        typer.echo("I has no second real photo to compare with: 1 means an identical embedding")


def _edits(
    pairs: Path | None, model: str | None, base: str | None, evaluator: Path | None, limit: int | None, fit: int,
    fit_lr: float, steps: int | None, report: Path | None, as_json: bool,
) -> None:  # fmt: skip
    from rich.console import Console
    from rich.markdown import Markdown

    from hyperlora import pretrained
    from hyperlora.cpu import keep_heap
    from hyperlora.diffusion.diffusion_base import load_base
    from hyperlora.diffusion.image_editing import require_editing
    from hyperlora.encoders.attribute_classifier import Reader
    from hyperlora.evaluation.edit_benchmark import load_edit_benchmark
    from hyperlora.evaluation.edit_evaluator import EditJudge
    from hyperlora.evaluation.edit_report import edit_markdown, edits_as_json, write_edit_report
    from hyperlora.evaluation.edit_suite import edit_rows, undone
    from hyperlora.pipelines.pair_to_lora import PairToLora

    keep_heap()
    frozen = load_base(base or pretrained.EDIT_BASE)
    require_editing(frozen)
    network = PairToLora.from_pretrained(model or pretrained.PAIR_MODEL, base=frozen)
    benchmark = load_edit_benchmark(pairs or pretrained.EDIT_BENCHMARK, frozen.resolution, limit)
    judge = EditJudge(
        frozen, Reader.from_pretrained(evaluator or pretrained.EVALUATOR), benchmark, steps or network.steps
    )
    rows = list(edit_rows(judge, network, fit_steps=fit, fit_lr=fit_lr))
    reverse = undone(judge, network)
    if report is not None:
        write_edit_report(report, rows, reverse)
    if as_json:
        typer.echo(json.dumps(edits_as_json(rows, reverse)))
        return
    Console().print(Markdown(edit_markdown(rows, reverse)))
