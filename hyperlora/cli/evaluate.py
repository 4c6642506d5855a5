"""``hyperlora evaluate``."""

import json
from pathlib import Path
from typing import Annotated, Final

import typer

from hyperlora.errors import InvalidArgumentError

_PHOTO_TASK = "Task subject"
_TASKS: Final = ("subject", "edit")
_DEFAULT_STEPS: Final = 20


def evaluate(
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
            help="Method of the bundled model: hypernetwork or difflora.",
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
            help="Also score the best of these many samples (difflora).",
            rich_help_panel=_PHOTO_TASK,
        ),
    ] = 1,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            help="Seed of the first subject's sample; then seed + 1, ... (difflora).",
            rich_help_panel=_PHOTO_TASK,
        ),
    ] = 0,
    lora_sampling_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Denoising steps over LoRA latents (difflora).",
            rich_help_panel=_PHOTO_TASK,
        ),
    ] = None,
    lora_guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="Classifier-free guidance by the photos (difflora).",
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
    from hyperlora.data.images import to_image
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.encoders.attribute_classifier import AttributeClassifier
    from hyperlora.encoders.identity_similarity import IdentitySimilarity
    from hyperlora.evaluation.benchmark import load_benchmark
    from hyperlora.evaluation.report import build_json_report, format_markdown, write_report
    from hyperlora.evaluation.subject_evaluator import SubjectEvaluator
    from hyperlora.evaluation.subject_suite import (
        FineTuneBaseline,
        SubjectSuiteConfig,
        evaluate_suite,
    )
    from hyperlora.pipelines.auto import load_image_to_lora
    from hyperlora.pipelines.config import GenerationConfig, LoraSampling
    from hyperlora.pipelines.generate import validate_config
    from hyperlora.pipelines.rerank import IdentityReranker, make_scoring_prompts

    disable_malloc_trim()
    evaluator_dir = evaluator or pretrained.EVALUATOR_DIR
    diffusion_base = load_diffusion_base(base or pretrained.BASE_DIR)
    image_to_lora = load_image_to_lora(model, method, diffusion_base)
    image_to_lora.layout.check_base(diffusion_base.id)
    benchmark = load_benchmark(
        benchmark_dir or pretrained.BENCHMARK_DIR, diffusion_base.resolution, num_subjects
    )
    subject_evaluator = SubjectEvaluator(
        diffusion_base,
        AttributeClassifier.from_pretrained(evaluator_dir),
        benchmark,
        steps or _DEFAULT_STEPS,
        guidance_scale,
    )
    finetune_baseline = (
        FineTuneBaseline(num_steps=finetune_steps, lr=lr) if finetune_steps else None
    )
    sampling = LoraSampling(seed, lora_sampling_steps, lora_guidance_scale)
    config = GenerationConfig(sampling=sampling, num_candidates=num_candidates)
    validate_config(image_to_lora, config)
    reranker = None
    if config.needs_reranking:
        reranker = IdentityReranker(
            diffusion_base,
            IdentitySimilarity.from_pretrained(evaluator_dir),
            make_scoring_prompts(image_to_lora.trigger_phrase),
        )
    suite_config = SubjectSuiteConfig(
        refine_steps=refine_steps,
        finetune_baseline=finetune_baseline,
        sampling=sampling,
        num_candidates=num_candidates,
        reranker=reranker,
    )
    results = list(evaluate_suite(subject_evaluator, image_to_lora, suite_config))
    if report_dir is not None:
        write_report(report_dir, results, [to_image(p) for p in benchmark.photos[:, 0]])
    if as_json:
        report = {"num_subjects": len(benchmark.names), "results": build_json_report(results)}
        typer.echo(json.dumps(report))
        return
    Console().print(Markdown(format_markdown(results)))
    if not benchmark.has_truth:
        typer.echo(
            "prompt accuracy needs prompts with known truth (prompts.json with truth): left out"
        )
    if benchmark.comparison_photos.shape[1] < 2:
        typer.echo(
            "identity has no second real photo to compare with: 1 means an identical embedding"
        )


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
    """Score a model from before/after pairs."""
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
