"""The verbs of a build, from plan to components. Heavy libraries are imported inside each."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

BuildDir = Annotated[Path, typer.Argument(help="Folder of the build.")]


def plan(
    source: Annotated[
        str,
        typer.Argument(
            help="avatars:FIRST-LAST, a folder of photos, a dataset's folder or hub id."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder of the build.")],
    recipe: Annotated[
        Path | None, typer.Option(help="recipe.json: in place of the options on how to fit.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model: folder or hub id.")] = None,
    preset: Annotated[
        str, typer.Option(help="Sites: attention, attention+mlp, attention+conv.")
    ] = "attention+mlp",
    rank: Annotated[int, typer.Option(min=1, help="Rank that is stored.")] = 4,
    parametrization: Annotated[
        str, typer.Option(help="What is fitted: lora, locon, lidb, loha, lokr.")
    ] = "lora",
    inner_rank: Annotated[
        int | None, typer.Option(min=1, help="Rank inside loha and lokr.")
    ] = None,
    init: Annotated[str, typer.Option(help="zero, shared, mean or network.")] = "shared",
    init_from: Annotated[str, typer.Option(help="Dataset (mean) or network to start from.")] = "",
    finetune_steps: Annotated[int, typer.Option(min=1)] = 300,
    lr: Annotated[float, typer.Option()] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of each subject per step.")] = 2,
    subjects_per_batch: Annotated[
        int, typer.Option(min=0, help="Subjects fitted together; 0: by the GPU's memory.")
    ] = 16,
    identifier: Annotated[
        str, typer.Option(help="What the subject is called where it is learned.")
    ] = "sks person",
    class_noun: Annotated[
        str, typer.Option("--class", help="What it is called where its class is drawn.")
    ] = "a person",
    prompt_template: Annotated[
        list[str] | None, typer.Option(help="Caption with {} for the subject; may be repeated.")
    ] = None,
    num_class_images: Annotated[
        int, typer.Option(min=0, help="Class pictures for prior preservation.")
    ] = 0,
    prior_loss_weight: Annotated[float, typer.Option()] = 1.0,
    num_crops: Annotated[int, typer.Option(min=1, help="Random crops of each photo.")] = 1,
    flip: Annotated[
        bool, typer.Option("--flip", help="Mirror photos: for symmetric subjects.")
    ] = False,
    num_val_photos: Annotated[
        int, typer.Option(min=0, help="Photos of each subject that only measure it.")
    ] = 0,
    eval_every: Annotated[
        int, typer.Option(min=1, help="Steps between looks at a subject's loss.")
    ] = 25,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Looks without a better loss that end a subject.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the base: float32, bfloat16, float16.")
    ] = "float32",
    variant: Annotated[str | None, typer.Option(help="Of the base's files, as fp16.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Gradient checkpointing.")
    ] = False,
    storage_dtype: Annotated[
        str, typer.Option(help="Numbers on disk: float32, float16, bfloat16.")
    ] = "float16",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    portraits_per_identity: Annotated[
        int, typer.Option(min=1, help="Portraits of each avatar.")
    ] = 4,
    resolution: Annotated[
        int, typer.Option(min=16, help="Pixels that avatars are drawn at.")
    ] = 128,
    loras_per_subject: Annotated[int, typer.Option(min=1, help="LoRAs of each subject.")] = 1,
    val_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Fraction of subjects for validation.")
    ] = 0.0,
    num_subjects: Annotated[int | None, typer.Option(min=1, help="Only so many subjects.")] = None,
    crop: Annotated[str, typer.Option(help="face, center or none.")] = "center",
    face_index: Annotated[
        int, typer.Option(min=0, help="Which face, by size from the largest (0).")
    ] = 0,
    face_pack: Annotated[
        str | None, typer.Option(help="insightface pack_chunks: folder or name.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hugging Face dataset.")] = "train",
    image_column: Annotated[str | None, typer.Option()] = None,
    subject_column: Annotated[str | None, typer.Option()] = None,
    caption_column: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Decide a dataset of LoRAs: whose, and how each is fitted. Photos are read once, what is skipped is named."""
    from data_builder.build.export_sample import read_recipe
    from data_builder.build.make_plan import make_plan, summarize_plan
    from data_builder.build.plan import Recipe, write_plan
    from data_builder.sources.crops import make_cropper
    from data_builder.sources.sources import parse_source
    from hyperlora import pretrained
    from hyperlora.cli.options import check_output_dir

    check_output_dir(output)
    final_recipe = Recipe(
        base=base or str(pretrained.BASE_DIR),
        preset=preset,
        rank=rank,
        parametrization=parametrization,
        inner_rank=inner_rank,
        init=init,
        init_from=init_from,
        finetune_steps=finetune_steps,
        lr=lr,
        batch_size=batch_size,
        subjects_per_batch=subjects_per_batch or 16,
        identifier=identifier,
        class_noun=class_noun,
        prompt_templates=tuple(prompt_template or ("a portrait of {}",)),
        num_class_images=num_class_images,
        prior_loss_weight=prior_loss_weight,
        num_crops=num_crops,
        flip=flip,
        num_val_photos=num_val_photos,
        eval_every=eval_every,
        patience=patience,
        dtype=dtype,
        variant=variant,
        gradient_checkpointing=gradient_checkpointing,
        storage_dtype=storage_dtype,
        seed=seed,
    )
    if recipe is not None:
        final_recipe = replace(read_recipe(recipe), base=final_recipe.base)
    final_recipe.validate()
    columns = {"image": image_column, "subject": subject_column, "caption": caption_column}
    photo_source = parse_source(
        source,
        portraits_per_identity=portraits_per_identity,
        resolution=resolution,
        split=split,
        columns=columns,
    )
    cropper = make_cropper(
        crop, face_pack, face_index
    )  # a bad pack is told before any photo is read
    metadata = {"crop": crop, **getattr(cropper, "notes", {})}
    build_plan = make_plan(
        photo_source,
        final_recipe,
        cropper=cropper,
        loras_per_subject=loras_per_subject,
        val_fraction=val_fraction,
        num_subjects=num_subjects,
        metadata=metadata,
    )
    if subjects_per_batch == 0:
        from data_builder.build.batch_size import scale_batch_size

        build_plan = scale_batch_size(build_plan)
    write_plan(build_plan, output)
    for line in build_plan.skipped:
        typer.echo(f"skipped: {line}", err=True)
    for line in build_plan.warnings:
        typer.echo(f"note: {line}", err=True)
    for line in summarize_plan(build_plan):
        typer.echo(line)


def run(
    build: BuildDir,
    ray: Annotated[
        str | None, typer.Option(help="On a Ray cluster: its address, or alone: this machine.")
    ] = None,
) -> None:
    """Fit what the plan asks for and is not done yet. May be killed at any moment; the same command goes on."""
    from hyperlora.cpu import disable_malloc_trim

    disable_malloc_trim()
    if ray is not None:
        from data_builder.build.run_ray import run_build_on_ray

        num_loras = run_build_on_ray(build, ray)
    else:
        from data_builder.build.run import run_build

        num_loras = run_build(build)
    typer.echo(f"{num_loras} LoRAs made; {build} is complete")


def show_status(
    build: BuildDir,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """How far a build is: LoRAs done and left, LoRAs/hour, time left, what was skipped."""
    from rich.console import Console

    from data_builder.build.status import make_table, read_status, to_dict

    build_status = read_status(build)
    if as_json:
        typer.echo(json.dumps(to_dict(build_status)))
        return
    Console().print(make_table(build_status, str(build)))
    for line in build_status.skipped:
        typer.echo(f"skipped: {line}")


def pack(
    build: BuildDir,
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    rows_per_shard: Annotated[int, typer.Option(min=1)] = 4096,
    partial: Annotated[bool, typer.Option("--partial", help="Take what is finished.")] = False,
    keep_flagged: Annotated[
        bool, typer.Option("--keep-flagged", help="Also rows that the run_audit refused.")
    ] = False,
) -> None:
    """Merge a build's chunks into large shards and one Parquet table; rows that `audit` refused are left out."""
    from data_builder.build.pack import pack_chunks
    from hyperlora.cli.options import check_output_dir

    check_output_dir(output)
    scores, flagged = _read_audit(build)
    num_rows = pack_chunks(
        build,
        output,
        rows_per_shard=rows_per_shard,
        partial=partial,
        scores=scores,
        excluded=() if keep_flagged else flagged,
    )
    num_excluded = 0 if keep_flagged else len(flagged)
    typer.echo(f"{num_rows} LoRAs and table.parquet in {output}, {num_excluded} left out")


def audit(
    build: BuildDir,
    evaluator: Annotated[
        str | None, typer.Option(help="Folder of a reader; `none`: score by the loss.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Score below which a row is flagged.")
    ] = None,
    num_scored_rows: Annotated[
        int | None, typer.Option(min=2, help="Draw only so many rows for the score.")
    ] = None,
    rows_per_group: Annotated[
        int, typer.Option(min=0, help="Best, median and worst rows on the page, each.")
    ] = 4,
    partial: Annotated[bool, typer.Option("--partial", help="Take what is finished.")] = False,
) -> None:
    """Find rows that are broken, odd, doubled or unlike their subject; write a page with pictures."""
    from data_builder.audit.run import REPORT_PATH, AuditConfig, run_audit
    from data_builder.build.plan import read_plan
    from hyperlora import pretrained

    is_avatar_build = read_plan(build).source["kind"] == "avatars"
    evaluator_dir = (
        Path(evaluator)
        if evaluator not in (None, "none")
        else pretrained.EVALUATOR_DIR
        if is_avatar_build
        else None
    )
    evaluator_dir = None if evaluator == "none" else evaluator_dir
    min_score = threshold if threshold is not None else 0.3 if evaluator_dir else 0.01
    findings = run_audit(
        build, AuditConfig(evaluator_dir, min_score, num_scored_rows, rows_per_group), partial
    )
    flagged = [finding for finding in findings if finding.flags]
    for finding in flagged:
        typer.echo(
            f"flagged: {finding.subject}"
            + (f"#{finding.repetition}" if finding.repetition else "")
            + f": {'; '.join(finding.flags)}"
        )
    typer.echo(f"{len(findings)} LoRAs, {len(flagged)} flagged; {build / REPORT_PATH}")


def import_loras(
    lora_files_dir: Annotated[Path, typer.Argument(help="Folder of LoRA files.")],
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    base: Annotated[
        str | None, typer.Option(help="Base model that they are for: folder or hub id.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Sites that each must have; unless given, the first file's.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank that is stored; unless given, the first file's.")
    ] = None,
    rows_per_shard: Annotated[int, typer.Option(min=1)] = 4096,
) -> None:
    """Make a dataset of a folder of ordinary LoRA files of any dialect; those that do not fit are refused by name."""
    from data_builder.build.import_files import import_lora_files, infer_layout
    from hyperlora import pretrained
    from hyperlora.cli.options import check_output_dir
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.diffusion.target_modules import make_layout

    check_output_dir(output)
    diffusion_base = load_diffusion_base(base or pretrained.BASE_DIR)
    if preset is None:
        layout = infer_layout(lora_files_dir, dict(diffusion_base.modules), diffusion_base.id)
    else:
        layout = make_layout(
            {next(iter(diffusion_base.modules)): diffusion_base.denoiser},
            preset,
            rank or 4,
            diffusion_base.id,
        )
    import_report = import_lora_files(
        lora_files_dir, output, layout.with_rank(rank or layout.rank), rows_per_shard
    )
    for line in (*import_report.errors, *import_report.warnings):
        typer.echo(line, err=True)
    typer.echo(
        f"{import_report.num_loras} LoRAs of rank {rank or layout.rank} in {output}, {len(import_report.errors)} refused"
    )


def export_sample(
    dataset: Annotated[Path, typer.Argument(help="Folder of a pack_chunks or a build.")],
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    max_bytes: Annotated[int, typer.Option(min=1, help="Bytes, all together.")] = 2_000_000,
    statistics: Annotated[
        bool, typer.Option(help="Mean and std of the rows too; a codec of theirs has them.")
    ] = True,
) -> None:
    """Write what is worth shipping of a dataset: its recipe, its statistics and a few rows."""
    from data_builder.build.export_sample import export_dataset_sample
    from hyperlora.cli.options import check_output_dir

    check_output_dir(output)
    num_rows = export_dataset_sample(dataset, output, max_bytes, statistics)
    typer.echo(f"{output}: recipe{', statistics' if statistics else ''} and {num_rows} of the rows")


def fit_pca(
    dataset: Annotated[
        Path,
        typer.Argument(
            help="Folder of a pack_chunks or a build; its rows of the split train count."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder of the LoraCodec to write.")],
    num_tokens: Annotated[int, typer.Option(min=1)] = 8,
    token_dim: Annotated[int, typer.Option(min=1, help="Numbers of each token.")] = 16,
    components_per_factor: Annotated[
        int, typer.Option(min=0, help="Directions of every factor; 0: of whole LoRAs at once.")
    ] = 20,
    canonical: Annotated[
        bool, typer.Option("--balanced", help="Factors of equal singular values first.")
    ] = False,
) -> None:
    """Learn the principal components of a dataset: a codec in closed form, in place of a trained autoencoder."""
    from hyperlora.cli.options import check_output_dir
    from hyperlora.data.lora_dataset import LoraDataset
    from hyperlora.pipelines.lora_codec import LoraCodec

    check_output_dir(output)
    data = LoraDataset(dataset, "train")
    codec = LoraCodec.fit_pca(data, num_tokens, token_dim, canonical, components_per_factor or None)
    codec.save_pretrained(output)
    typer.echo(
        f"{output}: {num_tokens} x {token_dim} numbers for {data.layout.numel} of {len(data)} LoRAs"
    )


def _read_audit(build: Path) -> tuple[dict[tuple[str, int], float], set[tuple[str, int]]]:
    """Scores, and rows that an audit refused, by subject and view."""
    from data_builder.audit.checks import read_findings

    findings = read_findings(build)
    scores = {(f.subject, f.repetition): f.score for f in findings if f.score is not None}
    return scores, {(f.subject, f.repetition) for f in findings if f.flags}
