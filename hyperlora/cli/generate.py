"""``hyperlora generate``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def generate(
    photos: Annotated[list[Path] | None, typer.Argument(help="Photos of one subject.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File (or, with --batch, folder) to write.")] = None,
    batch: Annotated[Path | None, typer.Option(help="Folder: one LoRA per image, or per sub-folder.")] = None,
    method: Annotated[
        str | None, typer.Option(help="hyperdreambooth (one forward pass) or difflora (a diffusion over LoRAs).")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a model of either method.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model for --refine and --best-of: folder or hub id.")] = None,
    format: Annotated[str, typer.Option(help="diffusers, kohya or sgm (SDXL).")] = "diffusers",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank to write; the model's own if not given.")] = None,
    strength: Annotated[float, typer.Option(help="Scale of the LoRA.")] = 1.0,
    refine: Annotated[int, typer.Option(min=0, help="Fine-tuning steps, above the LoRA of one pass.")] = 0,
    refine_by: Annotated[
        str | None, typer.Option(help="identity or photos; the first wherever the model can recognise someone.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, max=1000, help="LoRAs of one subject, each another sample.")] = 1,
    best_of: Annotated[int, typer.Option(min=1, max=1000, help="Make so many samples and keep the likest.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples: seed, seed + 1, ...")] = 0,
    sampling_steps: Annotated[int | None, typer.Option(min=1, help="Of the diffusion over LoRAs.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, max=100, help="By the photos, likewise.")] = None,
    evaluator: Annotated[Path | None, typer.Option(help="Folder of the reader that --best-of asks.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Subjects at a time with --batch.")] = 32,
    ray: Annotated[
        str | None, typer.Option(help="With --batch: on the Ray cluster at this address, or `local`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable result.")] = False,
) -> None:
    """Photo(s) of a subject in, a LoRA file out."""
    from hyperlora.cli.options import require_file, require_folder
    from hyperlora.errors import BadImage, BadRequest

    if out is None:
        raise BadRequest("where should the LoRA go? Give -o FILE (or -o FOLDER with --batch)")
    if (batch is None) == (not photos):
        raise BadRequest("give photos of one subject, or --batch FOLDER, and not both")
    if n > 1 and batch is not None:
        raise BadRequest("--n makes several LoRAs of one subject: leave out --batch, or choose with --best-of")
    if ray and best_of > 1:
        raise BadRequest("--best-of draws in this process: leave out --ray")
    if ray and batch is None:
        raise BadRequest("--ray is for many subjects: give --batch FOLDER too")
    if refine_by and not refine:
        raise BadRequest("--refine-by says how to refine: give --refine STEPS too")
    if format not in ("diffusers", "kohya", "sgm"):
        raise BadRequest(f"unknown format {format!r}; known: diffusers, kohya, sgm")
    if not -10 <= strength <= 10:  # also refuses NaN
        raise BadRequest(f"strength between -10 and 10 expected, got {strength}")
    if batch is None:
        require_file(out, ".safetensors")
    elif batch.resolve() in out.resolve().parents:
        raise BadRequest(f"{str(out)!r} lies in {str(batch)!r} and would count as a subject: write somewhere else")
    else:
        require_folder(out)

    from hyperlora import pretrained
    from hyperlora.cpu import keep_heap
    from hyperlora.data.images import read_image
    from hyperlora.diffusion.diffusion_base import load_base
    from hyperlora.encoders.identity_similarity import Likeness
    from hyperlora.pipelines.auto import open_photo_model
    from hyperlora.pipelines.generate import Settings, check, generate_files, numbered
    from hyperlora.pipelines.generate_folder import generate_folder
    from hyperlora.pipelines.image_to_lora_base import Sampling
    from hyperlora.pipelines.rerank import Chooser, portraits_of

    keep_heap()
    opened = [read_image(photo) for photo in photos or []]  # a bad photo is told before any model is loaded
    choosing = best_of > n
    frozen = load_base(base or pretrained.BASE) if refine or choosing else None
    network = open_photo_model(model, method, frozen)
    if frozen is not None:
        network.layout.require_base(frozen.id)
    sampling = Sampling(seed, sampling_steps, guidance)
    settings = Settings(format, rank, strength, refine, sampling, best_of, refine_by)  # type: ignore[arg-type]
    check(network, settings, n)
    chooser = None
    if frozen is not None and choosing:
        prompts = portraits_of(network.trigger)
        chooser = Chooser(frozen, Likeness.from_pretrained(evaluator or pretrained.EVALUATOR), prompts)
    if batch is None:
        made = generate_files(network, photos or [], numbered(out, n), settings, frozen, opened, chooser)
    else:
        maker = None
        if ray is not None:
            from hyperlora.pipelines.generate_ray import on_ray

            where = str(model or pretrained.PHOTO_MODELS[method or "hyperdreambooth"])
            maker = on_ray(ray, where, str(base or pretrained.BASE) if refine else None, settings)
        made = generate_folder(network, batch, out, settings, frozen, batch_size, maker, chooser)
    for item in made if batch else made[:1]:
        for notice in item.notices:
            typer.echo(f"warning: {item.subject}: {notice}", err=True)
    if as_json:
        typer.echo(json.dumps([asdict(m) for m in made] if batch or n > 1 else asdict(made[0])))
    bad = [item for item in made if item.error]
    for item in bad:
        typer.echo(f"skipped: {item.error}", err=True)
    if len(bad) == len(made):
        raise BadImage(f"no LoRA could be made from {str(batch)!r}: see the reasons above")
    if as_json:
        return
    if batch is None:
        written = rank or network.layout.rank
        for item in made:
            file = out.with_name(str(item.file))
            typer.echo(f"{file}: rank {written} for {network.layout.base}, {item.seconds:.2f} s")
    else:
        typer.echo(f"{len(made) - len(bad)} LoRAs and index.jsonl in {out}, {len(bad)} photos skipped")
