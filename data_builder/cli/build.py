"""The verbs of a build, from plan to components. Heavy libraries are imported inside each."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

Build = Annotated[Path, typer.Argument(help="Folder of the build.")]


def plan(
    source: Annotated[
        str, typer.Argument(help="avatars:FIRST-LAST, a folder of photos, a dataset's folder or hub id.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the build.")],
    recipe: Annotated[Path | None, typer.Option(help="recipe.json: in place of the options on how to fit.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model: folder or hub id.")] = None,
    preset: Annotated[str, typer.Option(help="Sites: attention, attention+mlp, attention+conv.")] = "attention+mlp",
    rank: Annotated[int, typer.Option(min=1, help="Rank that is stored.")] = 4,
    space: Annotated[str, typer.Option(help="What is fitted: lora, locon, lidb, loha, lokr.")] = "lora",
    inner: Annotated[int | None, typer.Option(min=1, help="Rank inside loha and lokr.")] = None,
    start: Annotated[str, typer.Option(help="zero, shared, mean or network.")] = "shared",
    start_from: Annotated[str, typer.Option(help="Dataset (mean) or network to start from.")] = "",
    steps: Annotated[int, typer.Option(min=1)] = 300,
    lr: Annotated[float, typer.Option()] = 1e-3,
    batch: Annotated[int, typer.Option(min=1, help="Examples of each subject per step.")] = 2,
    at_once: Annotated[int, typer.Option(min=0, help="Subjects fitted together; 0: by the GPU's memory.")] = 16,
    identifier: Annotated[str, typer.Option(help="What the subject is called where it is learned.")] = "sks person",
    class_name: Annotated[
        str, typer.Option("--class", help="What it is called where its class is drawn.")
    ] = "a person",
    template: Annotated[
        list[str] | None, typer.Option(help="Caption with {} for the subject; may be repeated.")
    ] = None,
    prior_images: Annotated[int, typer.Option(min=0, help="Class pictures for prior preservation.")] = 0,
    prior_weight: Annotated[float, typer.Option()] = 1.0,
    variants: Annotated[int, typer.Option(min=1, help="Random crops of each photo.")] = 1,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror photos: for symmetric subjects.")] = False,
    held_out: Annotated[int, typer.Option(min=0, help="Photos of each subject that only measure it.")] = 0,
    every: Annotated[int, typer.Option(min=1, help="Steps between looks at a subject's loss.")] = 25,
    patience: Annotated[int | None, typer.Option(min=1, help="Looks without a better loss that end a subject.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the base: float32, bfloat16, float16.")] = "float32",
    variant: Annotated[str | None, typer.Option(help="Of the base's files, as fp16.")] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Gradient checkpointing.")] = False,
    rows: Annotated[str, typer.Option(help="Numbers on disk: float32, float16, bfloat16.")] = "float16",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    each: Annotated[int, typer.Option(min=1, help="Portraits of each avatar.")] = 4,
    size: Annotated[int, typer.Option(min=16, help="Pixels that avatars are drawn at.")] = 128,
    views: Annotated[int, typer.Option(min=1, help="LoRAs of each subject.")] = 1,
    validation: Annotated[float, typer.Option(min=0, max=1, help="Fraction of subjects for validation.")] = 0.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many subjects.")] = None,
    crop: Annotated[str, typer.Option(help="face, center or none.")] = "center",
    face: Annotated[int, typer.Option(min=0, help="Which face, by size from the largest (0).")] = 0,
    face_pack: Annotated[str | None, typer.Option(help="insightface pack: folder or name.")] = None,
    split: Annotated[str, typer.Option(help="Split of a Hugging Face dataset.")] = "train",
    image_column: Annotated[str | None, typer.Option()] = None,
    subject_column: Annotated[str | None, typer.Option()] = None,
    caption_column: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Decide a dataset of LoRAs: whose, and how each is fitted. Photos are read once, what is skipped is named."""
    from data_builder.build.export_sample import read_recipe
    from data_builder.build.make_plan import make_plan, summary
    from data_builder.build.plan import Recipe, write_plan
    from data_builder.sources.crops import crop_of
    from data_builder.sources.sources import source_of
    from hyperlora import pretrained
    from hyperlora.cli.options import require_folder

    require_folder(out)
    fitting = Recipe(
        base=base or str(pretrained.BASE), preset=preset, rank=rank, space=space, inner=inner, start=start,
        start_from=start_from, steps=steps, lr=lr, batch=batch, at_once=at_once or 16, identifier=identifier,
        class_name=class_name, templates=tuple(template or ("a portrait of {}",)), prior_images=prior_images,
        prior_weight=prior_weight, variants=variants, flip=flip, held_out=held_out, every=every, patience=patience,
        dtype=dtype, variant=variant, checkpointing=checkpointing, rows=rows, seed=seed,
    )  # fmt: skip
    if recipe is not None:
        fitting = replace(read_recipe(recipe), base=fitting.base)
    fitting.check()
    columns = {"image": image_column, "subject": subject_column, "caption": caption_column}
    where = source_of(source, each=each, size=size, split=split, columns=columns)
    cropped = crop_of(crop, face_pack, face)  # a bad pack is told before any photo is read
    notes = {"crop": crop, **getattr(cropped, "notes", {})}
    made = make_plan(where, fitting, crop=cropped, views=views, validation=validation, limit=limit, notes=notes)
    if at_once == 0:
        from data_builder.build.batch_size import as_many_as_fit

        made = as_many_as_fit(made)
    write_plan(made, out)
    for line in made.skipped:
        typer.echo(f"skipped: {line}", err=True)
    for line in made.remarks:
        typer.echo(f"note: {line}", err=True)
    for line in summary(made):
        typer.echo(line)


def run(
    build: Build,
    ray: Annotated[str | None, typer.Option(help="On a Ray cluster: its address, or alone: this machine.")] = None,
) -> None:
    """Fit what the plan asks for and is not done yet. May be killed at any moment; the same command goes on."""
    from hyperlora.cpu import keep_heap

    keep_heap()
    if ray is not None:
        from data_builder.build.run_ray import run_on_ray

        made = run_on_ray(build, ray)
    else:
        from data_builder.build.run import run

        made = run(build)
    typer.echo(f"{made} LoRAs made; {build} is complete")


def status(build: Build, as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """How far a build is: LoRAs done and left, LoRAs/hour, time left, what was skipped."""
    from rich.console import Console

    from data_builder.build.status import as_dict, as_table, status

    found = status(build)
    if as_json:
        typer.echo(json.dumps(as_dict(found)))
        return
    Console().print(as_table(found, str(build)))
    for line in found.skipped:
        typer.echo(f"skipped: {line}")


def pack(
    build: Build,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    rows_per_shard: Annotated[int, typer.Option(min=1)] = 4096,
    partial: Annotated[bool, typer.Option("--partial", help="Take what is finished.")] = False,
    keep_flagged: Annotated[bool, typer.Option("--keep-flagged", help="Also rows that the audit refused.")] = False,
) -> None:
    """Merge a build's chunks into large shards and one Parquet table; rows that `audit` refused are left out."""
    from data_builder.build.pack import pack
    from hyperlora.cli.options import require_folder

    require_folder(out)
    scores, flagged = _audited(build)
    n = pack(build, out, rows_per_shard=rows_per_shard, partial=partial, scores=scores,
             without=() if keep_flagged else flagged)  # fmt: skip
    left_out = 0 if keep_flagged else len(flagged)
    typer.echo(f"{n} LoRAs and table.parquet in {out}, {left_out} left out")


def audit(
    build: Build,
    evaluator: Annotated[str | None, typer.Option(help="Folder of a reader; `none`: score by the loss.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Score below which a row is flagged.")] = None,
    sample: Annotated[int | None, typer.Option(min=2, help="Draw only so many rows for the score.")] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Best, median and worst rows on the page, each.")] = 4,
    partial: Annotated[bool, typer.Option("--partial", help="Take what is finished.")] = False,
) -> None:
    """Find rows that are broken, odd, doubled or unlike their subject; write a page with pictures."""
    from data_builder.audit.run import PAGE, Audit, audit
    from data_builder.build.plan import read_plan
    from hyperlora import pretrained

    drawn = read_plan(build).source["kind"] == "avatars"
    reader = Path(evaluator) if evaluator not in (None, "none") else pretrained.EVALUATOR if drawn else None
    reader = None if evaluator == "none" else reader
    least = threshold if threshold is not None else 0.3 if reader else 0.01
    found = audit(build, Audit(reader, least, sample, pictures), partial)
    flagged = [finding for finding in found if finding.flags]
    for finding in flagged:
        typer.echo(
            f"flagged: {finding.subject}"
            + (f"#{finding.view}" if finding.view else "")
            + f": {'; '.join(finding.flags)}"
        )
    typer.echo(f"{len(found)} LoRAs, {len(flagged)} flagged; {build / PAGE}")


def collect(
    files: Annotated[Path, typer.Argument(help="Folder of LoRA files.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    base: Annotated[str | None, typer.Option(help="Base model that they are for: folder or hub id.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Sites that each must have; unless given, the first file's.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank that is stored; unless given, the first file's.")
    ] = None,
    rows_per_shard: Annotated[int, typer.Option(min=1)] = 4096,
) -> None:
    """Make a dataset of a folder of ordinary LoRA files of any dialect; those that do not fit are refused by name."""
    from data_builder.build.import_files import collect, layout_of_files
    from hyperlora import pretrained
    from hyperlora.cli.options import require_folder
    from hyperlora.diffusion.diffusion_base import load_base
    from hyperlora.diffusion.target_modules import layout_of

    require_folder(out)
    model = load_base(base or pretrained.BASE)
    if preset is None:
        layout = layout_of_files(files, dict(model.modules), model.id)
    else:
        layout = layout_of({next(iter(model.modules)): model.denoiser}, preset, rank or 4, model.id)
    done = collect(files, out, layout.with_rank(rank or layout.rank), rows_per_shard)
    for line in (*done.refused, *done.remarks):
        typer.echo(line, err=True)
    typer.echo(f"{done.rows} LoRAs of rank {rank or layout.rank} in {out}, {len(done.refused)} refused")


def sample(
    dataset: Annotated[Path, typer.Argument(help="Folder of a pack or a build.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    most: Annotated[int, typer.Option(min=1, help="Bytes, all together.")] = 2_000_000,
    statistics: Annotated[bool, typer.Option(help="Mean and std of the rows too; a codec of theirs has them.")] = True,
) -> None:
    """Write what is worth shipping of a dataset: its recipe, its statistics and a few rows."""
    from data_builder.build.export_sample import ship
    from hyperlora.cli.options import require_folder

    require_folder(out)
    rows = ship(dataset, out, most, statistics)
    typer.echo(f"{out}: recipe{', statistics' if statistics else ''} and {rows} of the rows")


def components(
    dataset: Annotated[Path, typer.Argument(help="Folder of a pack or a build; its rows of the split train count.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the LoraCodec to write.")],
    tokens: Annotated[int, typer.Option(min=1)] = 8,
    width: Annotated[int, typer.Option(min=1, help="Numbers of each token.")] = 16,
    each: Annotated[int, typer.Option(min=0, help="Directions of every factor; 0: of whole LoRAs at once.")] = 20,
    balanced: Annotated[bool, typer.Option("--balanced", help="Factors of equal singular values first.")] = False,
) -> None:
    """Learn the principal components of a dataset: a codec in closed form, in place of a trained autoencoder."""
    from hyperlora.cli.options import require_folder
    from hyperlora.data.lora_dataset import LoraDataset
    from hyperlora.pipelines.lora_codec import LoraCodec

    require_folder(out)
    data = LoraDataset(dataset, "train")
    codec = LoraCodec.of_principal_components(data, tokens, width, balanced, each or None)
    codec.save_pretrained(out)
    typer.echo(f"{out}: {tokens} x {width} numbers for {data.layout.numel} of {len(data)} LoRAs")


def _audited(build: Path) -> tuple[dict[tuple[str, int], float], set[tuple[str, int]]]:
    """Scores, and rows that an audit refused, by subject and view."""
    from data_builder.audit.checks import read_findings

    found = read_findings(build)
    scores = {(f.subject, f.view): f.score for f in found if f.score is not None}
    return scores, {(f.subject, f.view) for f in found if f.flags}
