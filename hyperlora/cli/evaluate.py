"""``main_callback evaluate``."""

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    benchmark_dir: Annotated[
        Path | None, typer.Argument(help="Benchmark, or any folder of subjects or pairs.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="portrait (LoRAs from photos) or edit (from pairs).")
    ] = "portrait",
    method: Annotated[
        str | None, typer.Option(help="hyperdreambooth or difflora: whose model of the bundle.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a model of either (or a PairToLora).")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model: folder or hub id.")] = None,
    evaluator: Annotated[Path | None, typer.Option(help="Folder of the evaluator network.")] = None,
    num_subjects: Annotated[
        int | None, typer.Option(min=1, help="Only so many subjects (edits per group).")
    ] = None,
    refine_steps: Annotated[int, typer.Option(min=0, help="Also refined with so many steps.")] = 0,
    finetune_steps: Annotated[
        int, typer.Option(min=0, help="Also LoRAs fitted per subject, so many steps.")
    ] = 0,
    lr: Annotated[float, typer.Option(help="Learning rate of those.")] = 1e-3,
    num_candidates: Annotated[
        int, typer.Option(min=1, help="Also the likest of so many samples (difflora).")
    ] = 1,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the first person's sample; then + 1 (difflora).")
    ] = 0,
    lora_sampling_steps: Annotated[
        int | None, typer.Option(min=1, help="Of the diffusion over LoRAs.")
    ] = None,
    lora_guidance_scale: Annotated[
        float | None, typer.Option(min=0, max=100, help="By the photos, likewise.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps; 20, or the pair model's own.")
    ] = None,
    guidance_scale: Annotated[float, typer.Option(min=0, max=100)] = 3.0,
    report_dir: Annotated[
        Path | None, typer.Option(help="Folder for the table, pictures and plot.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable result.")] = False,
) -> None:
    """Scores of a model on unseen people, with every control: identity and prompt, or accuracy and preservation."""
    from hyperlora.cli.options import check_output_dir
    from hyperlora.errors import InvalidArgumentError

    if task not in ("portrait", "edit"):
        raise InvalidArgumentError(f"unknown task {task!r}; known: portrait, edit")
    if report_dir is not None:
        check_output_dir(report_dir)
    if task == "edit":
        _evaluate_edits(
            benchmark_dir,
            model,
            base,
            evaluator,
            num_subjects,
            finetune_steps,
            lr,
            steps,
            report_dir,
            as_json,
        )
        return

    from rich.console import Console
    from rich.markdown import Markdown

    from hyperlora import pretrained
    from hyperlora.cpu import disable_malloc_trim
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.encoders.attribute_classifier import AttributeClassifier
    from hyperlora.encoders.identity_similarity import IdentitySimilarity
    from hyperlora.evaluation.benchmark import load_benchmark
    from hyperlora.evaluation.report import build_json_report as rows_as_json
    from hyperlora.evaluation.report import format_markdown, write_report
    from hyperlora.evaluation.subject_evaluator import SubjectEvaluator
    from hyperlora.evaluation.subject_suite import FineTuneBaseline, evaluate_suite
    from hyperlora.pipelines.auto import load_image_to_lora
    from hyperlora.pipelines.generate import GenerationConfig, validate_config
    from hyperlora.pipelines.image_to_lora_base import SamplingConfig
    from hyperlora.pipelines.rerank import IdentityReranker, make_scoring_prompts

    disable_malloc_trim()
    diffusion_base = load_diffusion_base(base or pretrained.BASE_DIR)
    image_to_lora = load_image_to_lora(model, method, diffusion_base)
    image_to_lora.layout.check_base(diffusion_base.id)
    benchmark = load_benchmark(
        benchmark_dir or pretrained.BENCHMARK_DIR, diffusion_base.resolution, num_subjects
    )
    subject_evaluator = SubjectEvaluator(
        diffusion_base,
        AttributeClassifier.from_pretrained(evaluator or pretrained.EVALUATOR_DIR),
        benchmark,
        steps or 20,
        guidance_scale,
    )
    finetune_baseline = (
        FineTuneBaseline(num_steps=finetune_steps, lr=lr) if finetune_steps else None
    )
    sampling = SamplingConfig(seed, lora_sampling_steps, lora_guidance_scale)
    validate_config(
        image_to_lora, GenerationConfig(sampling=sampling, num_candidates=num_candidates)
    )
    reranker = None
    if num_candidates > 1:
        identity_similarity = IdentitySimilarity.from_pretrained(
            evaluator or pretrained.EVALUATOR_DIR
        )
        reranker = IdentityReranker(
            diffusion_base, identity_similarity, make_scoring_prompts(image_to_lora.trigger_phrase)
        )
    results = list(
        evaluate_suite(
            subject_evaluator,
            image_to_lora,
            refine_steps=refine_steps,
            fitting=finetune_baseline,
            sampling=sampling,
            best_of=num_candidates,
            chooser=reranker,
        )
    )
    if report_dir is not None:
        from hyperlora.data.images import to_image

        write_report(report_dir, results, [to_image(p) for p in benchmark.photos[:, 0]])
    if as_json:
        typer.echo(json.dumps({"people": len(benchmark.names), "rows": rows_as_json(results)}))
        return
    Console().print(Markdown(format_markdown(results)))
    if not benchmark.has_truth:
        typer.echo("P needs prompts with known truth (prompts.json with truth): left out")
    if benchmark.comparison_photos.shape[1] < 2:
        typer.echo("I has no second real photo to compare with: 1 means an identical embedding")


def _evaluate_edits(
    benchmark_dir: Path | None,
    model: str | None,
    base: str | None,
    evaluator: Path | None,
    num_edits: int | None,
    finetune_steps: int,
    lr: float,
    steps: int | None,
    report_dir: Path | None,
    as_json: bool,
) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    from hyperlora import pretrained
    from hyperlora.cpu import disable_malloc_trim
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.diffusion.image_editing import check_edit_base
    from hyperlora.encoders.attribute_classifier import AttributeClassifier
    from hyperlora.evaluation.edit_benchmark import load_edit_benchmark
    from hyperlora.evaluation.edit_evaluator import EditEvaluator
    from hyperlora.evaluation.edit_report import (
        build_edit_json_report,
        format_edit_markdown,
        write_edit_report,
    )
    from hyperlora.evaluation.edit_suite import evaluate_edit_suite, evaluate_reversal
    from hyperlora.pipelines.pair_to_lora import PairToLora

    disable_malloc_trim()
    edit_base = load_diffusion_base(base or pretrained.EDIT_BASE_DIR)
    check_edit_base(edit_base)
    pair_to_lora = PairToLora.from_pretrained(model or pretrained.PAIR_TO_LORA_DIR, base=edit_base)
    benchmark = load_edit_benchmark(
        benchmark_dir or pretrained.EDIT_BENCHMARK_DIR, edit_base.resolution, num_edits
    )
    edit_evaluator = EditEvaluator(
        edit_base,
        AttributeClassifier.from_pretrained(evaluator or pretrained.EVALUATOR_DIR),
        benchmark,
        steps or pair_to_lora.num_inference_steps,
    )
    results = list(
        evaluate_edit_suite(
            edit_evaluator, pair_to_lora, finetune_steps=finetune_steps, finetune_lr=lr
        )
    )
    reversal_errors = evaluate_reversal(edit_evaluator, pair_to_lora)
    if report_dir is not None:
        write_edit_report(report_dir, results, reversal_errors)
    if as_json:
        typer.echo(json.dumps(build_edit_json_report(results, reversal_errors)))
        return
    Console().print(Markdown(format_edit_markdown(results, reversal_errors)))
