"""``hyperlora evaluate``."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from hyperlora.cli.compute_options import ComputeOptions, add_compute_options
from hyperlora.errors import InvalidArgumentError
from hyperlora.seeds import MAX_SEED

if TYPE_CHECKING:
    from hyperlora.compute import ComputeConfig
    from hyperlora.pipelines.config import GenerationConfig

_PHOTO_TASK = "Task subject"
_TASKS: Final = ("subject", "edit")
_DEFAULT_STEPS: Final = 20


@add_compute_options("--device cpu")
def evaluate(
    *,
    compute_options: ComputeOptions,
    benchmark_dir: Annotated[
        Path | None,
        typer.Argument(
            help="Benchmark, or any folder of subjects or pairs.", show_default="the bundled one"
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(help="subject (LoRAs from photos) or edit (LoRAs from pairs).")
    ] = "subject",
    model: Annotated[
        str | None,
        typer.Option(help="Model from photos, or from pairs (task edit): folder or hub id."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model: folder or hub id.")] = None,
    evaluator: Annotated[
        Path | None, typer.Option(help="Folder of the attribute classifier that scores images.")
    ] = None,
    num_subjects: Annotated[
        int | None, typer.Option(min=1, help="Only the first subjects (or edits of each group).")
    ] = None,
    finetune_steps: Annotated[
        int, typer.Option(min=0, help="Also score LoRAs fine-tuned per subject, for these steps.")
    ] = 0,
    lr: Annotated[float, typer.Option(help="Learning rate of --finetune-steps.")] = 1e-3,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Denoising steps of an image; 20, or the pair model's own, by default.",
        ),
    ] = None,
    report_dir: Annotated[
        Path | None, typer.Option(help="Folder for the table, images and plot.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    method: Annotated[
        str | None,
        typer.Option(
            help="Method of the bundled model: hypernetwork or lora-diffusion.",
            show_default="hypernetwork",
            rich_help_panel=_PHOTO_TASK,
        ),
    ] = None,
    refine_steps: Annotated[
        int,
        typer.Option(
            min=0, help="Also score LoRAs refined for these steps.", rich_help_panel=_PHOTO_TASK
        ),
    ] = 0,
    num_candidates: Annotated[
        int,
        typer.Option(
            min=1,
            help="Also score the best of these many samples (lora-diffusion).",
            rich_help_panel=_PHOTO_TASK,
        ),
    ] = 1,
    judge: Annotated[
        str | None,
        typer.Option(
            help="What ranks --num-candidates: folder of an attribute classifier, or an "
            "insightface pack; the evaluator by default.",
            rich_help_panel=_PHOTO_TASK,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=MAX_SEED,
            help="Seed of the first subject's sample; then seed + 1, ... (lora-diffusion).",
            rich_help_panel=_PHOTO_TASK,
        ),
    ] = 0,
    lora_sampling_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Denoising steps over LoRA latents (lora-diffusion).",
            rich_help_panel=_PHOTO_TASK,
        ),
    ] = None,
    lora_guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="Classifier-free guidance by the photos (lora-diffusion).",
            rich_help_panel=_PHOTO_TASK,
        ),
    ] = None,
    guidance_scale: Annotated[
        float,
        typer.Option(
            min=0,
            max=100,
            help="Classifier-free guidance of an image.",
            rich_help_panel=_PHOTO_TASK,
        ),
    ] = 3.0,
) -> None:
    """Score a model on test subjects or edits, with controls."""
    from hyperlora.cli.options import check_output_dir

    if task not in _TASKS:
        raise InvalidArgumentError(f"unknown task {task!r}; known: {', '.join(_TASKS)}")
    if report_dir is not None:
        check_output_dir(report_dir)

    from hyperlora.cpu import disable_malloc_trim
    from hyperlora.pipelines.config import GenerationConfig, LoraSampling

    disable_malloc_trim()
    options = _EvaluationOptions(
        benchmark_dir=benchmark_dir,
        model=model,
        base=base,
        evaluator=evaluator,
        num_subjects=num_subjects,
        finetune_steps=finetune_steps,
        lr=lr,
        steps=steps,
        report_dir=report_dir,
        as_json=as_json,
        compute=compute_options.make_config(),
    )
    if task == "edit":
        _evaluate_edits(options)
        return
    sampling = LoraSampling(seed, lora_sampling_steps, lora_guidance_scale)
    config = GenerationConfig(sampling=sampling, num_candidates=num_candidates)
    _evaluate_subjects(options, method, config, refine_steps, guidance_scale, judge)


@dataclass(frozen=True)
class _EvaluationOptions:
    """Options of both tasks, under their names on the command line."""

    benchmark_dir: Path | None
    model: str | None
    base: str | None
    evaluator: Path | None
    num_subjects: int | None
    finetune_steps: int
    lr: float
    steps: int | None
    report_dir: Path | None
    as_json: bool
    compute: "ComputeConfig"


def _evaluate_subjects(
    options: _EvaluationOptions,
    method: str | None,
    config: "GenerationConfig",
    refine_steps: int,
    guidance_scale: float,
    judge: str | None,
) -> None:
    """Score a model from photos."""
    from hyperlora import pretrained
    from hyperlora.cli.options import load_model_and_reranker
    from hyperlora.data.images import to_image
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.encoders.attribute_classifier import AttributeClassifier
    from hyperlora.evaluation.benchmark import load_benchmark
    from hyperlora.evaluation.report import build_json_report, format_markdown, write_report
    from hyperlora.evaluation.subject_evaluator import SubjectEvaluator
    from hyperlora.evaluation.subject_suite import (
        FineTuneBaseline,
        SubjectSuiteConfig,
        evaluate_suite,
    )
    from hyperlora.pipelines.image_to_lora_base import ImageToLoraBase

    base = load_diffusion_base(options.base or pretrained.BASE_DIR, options.compute)
    model, reranker = load_model_and_reranker(
        options.model,
        method,
        base,
        config,
        judge or (str(options.evaluator) if options.evaluator else None),
        options.compute,
    )
    if not isinstance(model, ImageToLoraBase):
        raise InvalidArgumentError(
            f"{options.model!r} is a network that others released, and this benchmark is for "
            "hyperlora's own models: leave out --model"
        )
    classifier = AttributeClassifier.from_pretrained(options.evaluator or pretrained.EVALUATOR_DIR)
    benchmark = load_benchmark(
        options.benchmark_dir or pretrained.BENCHMARK_DIR, base.resolution, options.num_subjects
    )
    evaluator = SubjectEvaluator(
        base,
        classifier.to(options.compute.torch_device),
        benchmark,
        options.steps or _DEFAULT_STEPS,
        guidance_scale,
    )
    finetune_baseline = None
    if options.finetune_steps:
        finetune_baseline = FineTuneBaseline(num_steps=options.finetune_steps, lr=options.lr)
    suite_config = SubjectSuiteConfig(
        refine_steps=refine_steps,
        finetune_baseline=finetune_baseline,
        sampling=config.sampling,
        num_candidates=config.num_candidates,
        reranker=reranker,
    )
    results = list(evaluate_suite(evaluator, model, suite_config))
    if options.report_dir is not None:
        write_report(options.report_dir, results, [to_image(p) for p in benchmark.photos[:, 0]])
    if options.as_json:
        report = {"num_subjects": len(benchmark.names), "results": build_json_report(results)}
        typer.echo(json.dumps(report))
        return
    _print_markdown(format_markdown(results))
    if not benchmark.has_truth:
        typer.echo(
            "prompt accuracy needs prompts with known truth (prompts.json with truth): left out"
        )
    if benchmark.comparison_photos.shape[1] < 2:
        typer.echo(
            "identity has no second real photo to compare with: 1 means an identical embedding"
        )


def _evaluate_edits(options: _EvaluationOptions) -> None:
    """Score a model from before/after pairs."""
    from hyperlora import pretrained
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

    compute = options.compute
    base = load_diffusion_base(options.base or pretrained.EDIT_BASE_DIR, compute)
    check_edit_base(base)
    model = PairToLora.from_pretrained(
        options.model or pretrained.PAIR_TO_LORA_DIR, base=base, compute=compute
    )
    classifier = AttributeClassifier.from_pretrained(options.evaluator or pretrained.EVALUATOR_DIR)
    benchmark = load_edit_benchmark(
        options.benchmark_dir or pretrained.EDIT_BENCHMARK_DIR,
        base.resolution,
        options.num_subjects,
    )
    evaluator = EditEvaluator(
        base,
        classifier.to(compute.torch_device),
        benchmark,
        options.steps or model.num_inference_steps,
    )
    results = list(
        evaluate_edit_suite(
            evaluator, model, finetune_steps=options.finetune_steps, finetune_lr=options.lr
        )
    )
    reversal_errors = evaluate_reversal(evaluator, model)
    if options.report_dir is not None:
        write_edit_report(options.report_dir, results, reversal_errors)
    if options.as_json:
        typer.echo(json.dumps(build_edit_json_report(results, reversal_errors)))
        return
    _print_markdown(format_edit_markdown(results, reversal_errors))


def _print_markdown(text: str) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))
