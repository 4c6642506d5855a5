"""Commands of a build: plan, run, status, audit, pack, import."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_builder.cli.options import BuildDir, OutputDir
from hyperlora.cli.compute_options import ComputeOptions, add_compute_options
from hyperlora.cli.options import replace_unprintable
from hyperlora.seeds import MAX_SEED

if TYPE_CHECKING:
    from data_builder.build.pack import RowKey


def plan(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            help="avatars:FIRST-LAST, a folder of photos, a dataset's folder or hub id."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the build.")],
    recipe: Annotated[
        Path | None, typer.Option(help="recipe.json that replaces the fitting options.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model: folder or hub id.")] = None,
    preset: Annotated[
        str, typer.Option(help="Adapted modules: attention, attention+mlp, attention+conv.")
    ] = "attention+mlp",
    text_encoders: Annotated[
        bool, typer.Option("--text-encoders", help="Adapt the CLIP text encoders, too.")
    ] = False,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the stored LoRAs.")] = 4,
    parametrization: Annotated[
        str, typer.Option(help="What is fitted: lora, locon, lidb, loha, lokr.")
    ] = "lora",
    inner_rank: Annotated[
        int | None, typer.Option(min=1, help="Rank inside loha and lokr.")
    ] = None,
    init: Annotated[
        str, typer.Option(help="Start of each fit: zero, shared, mean or network.")
    ] = "shared",
    init_from: Annotated[
        str, typer.Option(help="Dataset (--init mean) or network (--init network).")
    ] = "",
    finetune_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 300,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    lr_scheduler: Annotated[
        str, typer.Option(help="How it falls: constant, linear or cosine.")
    ] = "constant",
    lr_warmup_steps: Annotated[
        int, typer.Option(min=0, help="Steps over which the learning rate rises from 0.")
    ] = 0,
    timestep_shift: Annotated[
        float, typer.Option(help="Above 1, noisier timesteps are drawn more often.")
    ] = 1.0,
    snr_gamma: Annotated[
        float | None,
        typer.Option(help="γ of Min-SNR weighting, e.g. 5; by default there is none."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of each subject per step.")] = 2,
    subjects_per_batch: Annotated[
        int, typer.Option(min=0, help="Subjects fitted together; 0: by the GPU's memory.")
    ] = 16,
    identifier: Annotated[
        str, typer.Option(help="Phrase for the subject in training prompts.")
    ] = "sks person",
    class_noun: Annotated[
        str, typer.Option(help="Phrase for the subject in prompts of class images.")
    ] = "a person",
    prompt_templates: Annotated[
        list[str] | None,
        typer.Option("--prompt-template", help="Caption with {} for the subject; repeatable."),
    ] = None,
    num_class_images: Annotated[
        int, typer.Option(min=0, help="Class images for prior preservation.")
    ] = 0,
    prior_loss_weight: Annotated[float, typer.Option(help="Weight of prior preservation.")] = 1.0,
    num_crops: Annotated[int, typer.Option(min=1, help="Crops of each photo.")] = 1,
    flip: Annotated[
        bool, typer.Option("--flip", help="Add mirrored photos: for symmetric subjects.")
    ] = False,
    num_val_photos: Annotated[
        int, typer.Option(min=0, help="Photos of each subject that only evaluate its LoRA.")
    ] = 0,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 25,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Evaluations without improvement after which a subject stops."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Precision of the base: float32, bfloat16, float16.")
    ] = "float32",
    variant: Annotated[
        str | None, typer.Option(help="Variant of the base's files, e.g. fp16.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Save memory, at the cost of time.")
    ] = False,
    storage_dtype: Annotated[
        str, typer.Option(help="Precision on disk: float32, float16, bfloat16.")
    ] = "float16",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of all random choices.")] = 0,
    shared_noise: Annotated[
        bool, typer.Option("--shared-noise", help="Draw the same noise for all subjects.")
    ] = False,
    portraits_per_identity: Annotated[
        int, typer.Option(min=1, help="Portraits of each avatar.")
    ] = 4,
    resolution: Annotated[
        int, typer.Option(min=16, help="Side of avatar portraits in pixels.")
    ] = 128,
    loras_per_subject: Annotated[int, typer.Option(min=1, help="LoRAs of each subject.")] = 1,
    val_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of subjects for validation.")
    ] = 0.0,
    num_subjects: Annotated[
        int | None, typer.Option(min=1, help="Number of subjects; by default all.")
    ] = None,
    crop: Annotated[str, typer.Option(help="face, center or none.")] = "center",
    face_index: Annotated[
        int, typer.Option(min=0, help="Which face, by size from the largest (0).")
    ] = 0,
    face_pack: Annotated[str | None, typer.Option(help="insightface pack: folder or name.")] = None,
    split: Annotated[str, typer.Option(help="Split of a Hugging Face dataset.")] = "train",
    image_column: Annotated[str | None, typer.Option(help="Column of images.")] = None,
    subject_column: Annotated[str | None, typer.Option(help="Column of subject names.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of captions.")] = None,
) -> None:
    """Plan a dataset of LoRAs: read all photos once and list what is skipped."""
    from data_builder.build.batch_size import CPU_BATCH_SIZE, scale_batch_size
    from data_builder.build.export_sample import read_recipe
    from data_builder.build.make_plan import check_recipe_base, make_plan, summarize_plan
    from data_builder.build.plan import Recipe, write_plan
    from data_builder.sources.crops import make_cropper
    from data_builder.sources.sources import parse_source
    from hyperlora import pretrained
    from hyperlora.cli.options import check_output_dir

    check_output_dir(output)
    # the options above are named after the fields of Recipe
    recipe_fields = {field.name: context.params[field.name] for field in fields(Recipe)}
    recipe_fields |= {
        "base": base or str(pretrained.BASE_DIR),
        "subjects_per_batch": subjects_per_batch or CPU_BATCH_SIZE,
        "prompt_templates": tuple(prompt_templates or ("a portrait of {}",)),
    }
    final_recipe = Recipe(**recipe_fields)
    if recipe is not None:
        final_recipe = replace(read_recipe(recipe), base=final_recipe.base)
    final_recipe.validate()
    check_recipe_base(final_recipe)
    photo_source = parse_source(
        source,
        portraits_per_identity=portraits_per_identity,
        resolution=resolution,
        split=split,
        columns={
            "image_column": image_column,
            "subject_column": subject_column,
            "caption_column": caption_column,
        },
    )
    cropper = make_cropper(crop, face_pack, face_index)  # fails before any photo is read
    build_plan = make_plan(
        photo_source,
        final_recipe,
        cropper=cropper,
        loras_per_subject=loras_per_subject,
        val_fraction=val_fraction,
        num_subjects=num_subjects,
        metadata={"crop": crop, **cropper.metadata},
    )
    if subjects_per_batch == 0:
        build_plan = scale_batch_size(build_plan)
    write_plan(build_plan, output)
    for line in build_plan.skipped:
        typer.echo(f"skipped: {replace_unprintable(line)}", err=True)
    for line in build_plan.warnings:
        typer.echo(f"note: {replace_unprintable(line)}", err=True)
    for line in summarize_plan(build_plan):
        typer.echo(line)


@add_compute_options("a plan with smaller --subjects-per-batch", ("device",))
def run(
    *,
    compute_options: ComputeOptions,
    build: BuildDir,
    ray: Annotated[
        str | None,
        typer.Option(help="Use a Ray cluster: its address, or no value for this machine."),
    ] = None,
) -> None:
    """Fit the pending LoRAs of a plan. A killed run continues when it is started again."""
    from data_builder.build.plan import read_plan
    from hyperlora.cpu import disable_malloc_trim

    disable_malloc_trim()
    device = compute_options.device
    if ray is not None:
        from data_builder.build.run_ray import run_build_on_ray

        typer.echo(f"running in Ray workers, device {device}", err=True)
        num_loras = run_build_on_ray(build, ray, device)
    else:
        from data_builder.build.run import run_build

        replace(compute_options, dtype=read_plan(build).recipe.dtype).make_config()
        num_loras = run_build(build, device)
    typer.echo(f"{num_loras} LoRAs fitted; {build} is complete")


def show_status(
    build: BuildDir,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Show the progress of a build: LoRAs finished and pending, LoRAs/hour, time left, skipped
    photos.
    """
    from rich.console import Console

    from data_builder.build.status import make_table, read_status

    build_status = read_status(build)
    if as_json:
        typer.echo(json.dumps(asdict(build_status)))
        return
    Console().print(make_table(build_status, str(build)))
    for line in build_status.skipped:
        typer.echo(f"skipped: {replace_unprintable(line)}")


@add_compute_options("--device cpu", ("device",))
def audit(
    *,
    compute_options: ComputeOptions,
    build: BuildDir,
    evaluator: Annotated[
        str | None,
        typer.Option(help="Folder of an attribute classifier; `none`: score by the loss."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Score below which a row is flagged.")
    ] = None,
    num_scored_rows: Annotated[
        int | None, typer.Option(min=2, help="Number of random rows to score; by default all.")
    ] = None,
    rows_per_group: Annotated[
        int, typer.Option(min=0, help="Best, median and worst rows in the report, each.")
    ] = 4,
    partial: Annotated[bool, typer.Option("--partial", help="Use the finished chunks.")] = False,
) -> None:
    """Find rows that are broken, outliers, duplicates or unlike their subject; write a report."""
    from data_builder.audit.run import REPORT_PATH, AuditConfig, run_audit
    from data_builder.build.plan import read_plan
    from hyperlora import pretrained

    build_plan, evaluator_dir = read_plan(build), None
    replace(compute_options, dtype=build_plan.recipe.dtype).make_config()
    if evaluator is None:  # the bundled evaluator knows avatars only
        is_avatar_build = build_plan.source["kind"] == "avatars"
        evaluator_dir = pretrained.EVALUATOR_DIR if is_avatar_build else None
    elif evaluator != "none":
        evaluator_dir = Path(evaluator)
    if threshold is None:
        threshold = 0.3 if evaluator_dir else 0.01
    config = AuditConfig(evaluator_dir, threshold, num_scored_rows, rows_per_group)
    findings = run_audit(build, config, partial, compute_options.device)
    flagged = [finding for finding in findings if finding.flags]
    for finding in flagged:
        repetition = f"#{finding.repetition}" if finding.repetition else ""
        line = f"{finding.subject}{repetition}: {'; '.join(finding.flags)}"
        typer.echo(f"flagged: {replace_unprintable(line)}")
    typer.echo(f"{len(findings)} LoRAs, {len(flagged)} flagged; {build / REPORT_PATH}")


def pack(
    build: BuildDir,
    output: OutputDir,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="LoRAs in each shard.")] = 4096,
    partial: Annotated[bool, typer.Option("--partial", help="Use the finished chunks.")] = False,
    keep_flagged: Annotated[
        bool, typer.Option("--keep-flagged", help="Also write rows that `audit` flagged.")
    ] = False,
) -> None:
    """Merge the chunks of a build into large shards and a Parquet table, without flagged rows."""
    from data_builder.build.pack import pack_chunks
    from hyperlora.cli.options import check_output_dir

    check_output_dir(output)
    scores, flagged = _read_audit(build)
    excluded = set() if keep_flagged else flagged
    num_rows = pack_chunks(
        build,
        output,
        rows_per_shard=rows_per_shard,
        partial=partial,
        scores=scores,
        excluded=excluded,
        allow_non_finite=keep_flagged,
    )
    typer.echo(f"{num_rows} LoRAs and table.parquet in {output}, {len(excluded)} left out")


def import_loras(
    lora_files_dir: Annotated[Path, typer.Argument(help="Folder of LoRA files.")],
    output: OutputDir,
    base: Annotated[
        str | None, typer.Option(help="Base model of the LoRAs: folder or hub id.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Adapted modules; by default those of the first file.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Rank of the stored LoRAs; by default that of the first file."),
    ] = None,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="LoRAs in each shard.")] = 4096,
) -> None:
    """Make a dataset from a folder of LoRA files of any dialect; list files that do not fit."""
    from data_builder.build.import_files import import_lora_files, infer_layout
    from hyperlora import pretrained
    from hyperlora.cli.options import check_output_dir
    from hyperlora.compute import ComputeConfig
    from hyperlora.diffusion.diffusion_base import load_diffusion_base

    check_output_dir(output)
    base_compute = ComputeConfig(device="cpu")  # only its shapes are needed
    diffusion_base = load_diffusion_base(base or pretrained.BASE_DIR, base_compute)
    if preset is None:
        layout = infer_layout(lora_files_dir, dict(diffusion_base.modules), diffusion_base.id)
    else:
        layout = diffusion_base.make_layout(preset, rank or 4)
    if rank is not None:
        layout.check_rank(rank)
        layout = layout.with_rank(rank)
    import_report = import_lora_files(lora_files_dir, output, layout, rows_per_shard)
    for line in (*import_report.errors, *import_report.warnings):
        typer.echo(replace_unprintable(line), err=True)
    typer.echo(
        f"{import_report.num_loras} LoRAs of rank {layout.rank} in {output}, "
        f"{len(import_report.errors)} refused"
    )


def _read_audit(build: Path) -> "tuple[dict[RowKey, float], set[RowKey]]":
    """Scores, and flagged rows, of the last audit."""
    from data_builder.audit.checks import read_findings

    findings = read_findings(build)
    scores = {(f.subject, f.repetition): f.score for f in findings if f.score is not None}
    return scores, {(f.subject, f.repetition) for f in findings if f.flags}
