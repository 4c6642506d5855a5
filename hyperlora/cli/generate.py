"""``main_callback generate_loras``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def generate(
    photos: Annotated[
        list[Path] | None, typer.Argument(help="Photos of one subject.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--out", help="File (or, with --batch, folder) to write.")
    ] = None,
    input_dir: Annotated[
        Path | None, typer.Option(help="Folder: one LoRA per image, or per sub-folder.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="hyperdreambooth (one forward pass) or difflora (a diffusion over LoRAs)."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a model of either method.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model for --refine and --best-of: folder or hub id.")
    ] = None,
    format: Annotated[str, typer.Option(help="diffusers, kohya or sgm (SDXL).")] = "diffusers",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank to write; the model's own if not given.")
    ] = None,
    strength: Annotated[float, typer.Option(help="Scale of the LoRA.")] = 1.0,
    refine_steps: Annotated[
        int, typer.Option(min=0, help="Fine-tuning steps, above the LoRA of one pass.")
    ] = 0,
    refine_method: Annotated[
        str | None,
        typer.Option(
            help="identity or photos; the first wherever the model can recognise someone."
        ),
    ] = None,
    num_loras: Annotated[
        int, typer.Option("--n", min=1, max=1000, help="LoRAs of one subject, each another sample.")
    ] = 1,
    num_candidates: Annotated[
        int, typer.Option(min=1, max=1000, help="Make so many samples and keep the likest.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples: seed, seed + 1, ...")] = 0,
    lora_sampling_steps: Annotated[
        int | None, typer.Option(min=1, help="Of the diffusion over LoRAs.")
    ] = None,
    lora_guidance_scale: Annotated[
        float | None, typer.Option(min=0, max=100, help="By the photos, likewise.")
    ] = None,
    evaluator: Annotated[
        Path | None, typer.Option(help="Folder of the reader that --best-of asks.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Subjects at a time with --batch.")] = 32,
    ray: Annotated[
        str | None,
        typer.Option(help="With --batch: on the Ray cluster at this address, or `local`."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable result.")] = False,
) -> None:
    """Photo(s) of a subject in, a LoRA file out."""
    from hyperlora.cli.options import check_output_dir, check_output_file
    from hyperlora.errors import InvalidArgumentError, InvalidImageError

    if output is None:
        raise InvalidArgumentError(
            "where should the LoRA go? Give -o FILE (or -o FOLDER with --batch)"
        )
    if (input_dir is None) == (not photos):
        raise InvalidArgumentError("give photos of one subject, or --batch FOLDER, and not both")
    if num_loras > 1 and input_dir is not None:
        raise InvalidArgumentError(
            "--n makes several LoRAs of one subject: leave out --batch, or choose with --best-of"
        )
    if ray and num_candidates > 1:
        raise InvalidArgumentError("--best-of draws in this process: leave out --ray")
    if ray and input_dir is None:
        raise InvalidArgumentError("--ray is for many subjects: give --batch FOLDER too")
    if refine_method and not refine_steps:
        raise InvalidArgumentError("--refine-by says how to refine: give --refine STEPS too")
    if format not in ("diffusers", "kohya", "sgm"):
        raise InvalidArgumentError(f"unknown format {format!r}; known: diffusers, kohya, sgm")
    if not -10 <= strength <= 10:  # also refuses NaN
        raise InvalidArgumentError(f"strength between -10 and 10 expected, got {strength}")
    if input_dir is None:
        check_output_file(output, ".safetensors")
    elif input_dir.resolve() in output.resolve().parents:
        raise InvalidArgumentError(
            f"{str(output)!r} lies in {str(input_dir)!r} and would count as a subject: write somewhere else"
        )
    else:
        check_output_dir(output)

    from hyperlora import pretrained
    from hyperlora.cpu import disable_malloc_trim
    from hyperlora.data.images import read_image
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.encoders.identity_similarity import IdentitySimilarity
    from hyperlora.pipelines.auto import load_image_to_lora
    from hyperlora.pipelines.generate import (
        GenerationConfig,
        generate_files,
        make_numbered_paths,
        validate_config,
    )
    from hyperlora.pipelines.generate_folder import generate_folder
    from hyperlora.pipelines.image_to_lora_base import SamplingConfig
    from hyperlora.pipelines.rerank import IdentityReranker, make_scoring_prompts

    disable_malloc_trim()
    images = [
        read_image(photo) for photo in photos or []
    ]  # a bad photo is told before any model is loaded
    needs_reranking = num_candidates > num_loras
    diffusion_base = (
        load_diffusion_base(base or pretrained.BASE_DIR)
        if refine_steps or needs_reranking
        else None
    )
    image_to_lora = load_image_to_lora(model, method, diffusion_base)
    if diffusion_base is not None:
        image_to_lora.layout.check_base(diffusion_base.id)
    sampling = SamplingConfig(seed, lora_sampling_steps, lora_guidance_scale)
    config = GenerationConfig(
        format, rank, strength, refine_steps, sampling, num_candidates, refine_method
    )  # type: ignore[arg-type]
    validate_config(image_to_lora, config, num_loras)
    reranker = None
    if diffusion_base is not None and needs_reranking:
        prompts = make_scoring_prompts(image_to_lora.trigger_phrase)
        reranker = IdentityReranker(
            diffusion_base,
            IdentitySimilarity.from_pretrained(evaluator or pretrained.EVALUATOR_DIR),
            prompts,
        )
    if input_dir is None:
        records = generate_files(
            image_to_lora,
            photos or [],
            make_numbered_paths(output, num_loras),
            config,
            diffusion_base,
            images,
            reranker,
        )
    else:
        batch_generator = None
        if ray is not None:
            from hyperlora.pipelines.generate_ray import make_ray_batch_generator

            model_id = str(model or pretrained.MODEL_DIR_BY_METHOD[method or "hyperdreambooth"])
            batch_generator = make_ray_batch_generator(
                ray, model_id, str(base or pretrained.BASE_DIR) if refine_steps else None, config
            )
        records = generate_folder(
            image_to_lora,
            input_dir,
            output,
            config,
            diffusion_base,
            batch_size,
            batch_generator,
            reranker,
        )
    for record in records if input_dir else records[:1]:
        for warning in record.warnings:
            typer.echo(f"warning: {record.subject}: {warning}", err=True)
    if as_json:
        typer.echo(
            json.dumps(
                [asdict(m) for m in records] if input_dir or num_loras > 1 else asdict(records[0])
            )
        )
    failed = [record for record in records if record.error]
    for record in failed:
        typer.echo(f"skipped: {record.error}", err=True)
    if len(failed) == len(records):
        raise InvalidImageError(
            f"no LoRA could be made from {str(input_dir)!r}: see the reasons above"
        )
    if as_json:
        return
    if input_dir is None:
        written_rank = rank or image_to_lora.layout.rank
        for record in records:
            file = output.with_name(str(record.file))
            typer.echo(
                f"{file}: rank {written_rank} for {image_to_lora.layout.base}, {record.seconds:.2f} s"
            )
    else:
        typer.echo(
            f"{len(records) - len(failed)} LoRAs and index.jsonl in {output}, {len(failed)} photos skipped"
        )
