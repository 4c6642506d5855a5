"""``hyperlora generate``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from hyperlora.cli.compute_options import ComputeOptions, add_compute_options
from hyperlora.cli.options import FORMAT_HELP, replace_unprintable, warn_of_lost_readers
from hyperlora.errors import InvalidArgumentError, InvalidImageError
from hyperlora.seeds import MAX_SEED

if TYPE_CHECKING:
    from hyperlora.lora.io.formats import FormatChoice
    from hyperlora.pipelines.config import GenerationConfig, RefineMethod
    from hyperlora.pipelines.generate import GenerationRecord

_SAMPLING = "Sampling (--method lora-diffusion)"
_REFINEMENT = "Refinement"
_FOLDERS = "Many subjects"
_RELEASED = "Networks that others released (--model ORG/NAME[:VARIANT])"


@add_compute_options("fewer photos or a smaller --batch-size")
def generate(
    *,
    compute_options: ComputeOptions,
    photos: Annotated[
        list[Path] | None, typer.Argument(help="Photos of one subject.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="LoRA file to write; a folder with --input-dir."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Method of the bundled model: hypernetwork (one forward pass) or lora-diffusion "
            "(a diffusion over LoRAs).",
            show_default="hypernetwork",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model from photos: folder or hub id, also of networks that others released, "
            "e.g. bytedance-research/HyperLoRA:edit."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model: folder or hub id; used by --refine-steps and --num-candidates."
        ),
    ] = None,
    format: Annotated[str, typer.Option(help=FORMAT_HELP)] = "auto",
    rank: Annotated[
        int | None, typer.Option(min=1, help="LoRA rank; the model's own by default.")
    ] = None,
    strength: Annotated[
        float, typer.Option(help="Factor of the LoRA weights, from -10 to 10.")
    ] = 1.0,
    refine_steps: Annotated[
        int,
        typer.Option(
            min=0,
            help="Fine-tuning steps that start from the generated LoRA.",
            rich_help_panel=_REFINEMENT,
        ),
    ] = 0,
    refine_method: Annotated[
        str | None,
        typer.Option(
            help="Objective: identity (of generated images) or photos (denoising loss); identity "
            "by default, where the model can embed it.",
            rich_help_panel=_REFINEMENT,
        ),
    ] = None,
    num_loras: Annotated[
        int,
        typer.Option(
            min=1,
            max=1000,
            help="LoRAs to write, each another sample.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 1,
    num_candidates: Annotated[
        int,
        typer.Option(
            min=1,
            max=1000,
            help="LoRAs to sample; those most similar to the photos are kept.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 1,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=MAX_SEED,
            help="Seed of the first sample; then seed + 1, ...",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0,
    lora_sampling_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Denoising steps over LoRA latents; the model's own by default.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    lora_guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="Classifier-free guidance by the photos; the model's own by default.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="What ranks --num-candidates: folder of an attribute classifier, or an "
            "insightface pack; the bundled classifier by default.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    input_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of subjects, instead of photos: each image or sub-folder is one.",
            rich_help_panel=_FOLDERS,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Subjects per forward pass.", rich_help_panel=_FOLDERS)
    ] = 32,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Run on the Ray cluster at this address, or on `local`.", rich_help_panel=_FOLDERS
        ),
    ] = None,
    face_pack: Annotated[
        str | None,
        typer.Option(
            help="Face pack of insightface: folder or name.",
            show_default="the network's own",
            rich_help_panel=_RELEASED,
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Image encoder: folder or hub id.",
            show_default="the network's own",
            rich_help_panel=_RELEASED,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit on the hub.", rich_help_panel=_RELEASED),
    ] = None,
    trust_remote_code: Annotated[
        str | None,
        typer.Option(
            help="SHA-256 of the code of a template (model.py) that may run here.",
            rich_help_panel=_RELEASED,
        ),
    ] = None,
    offline: Annotated[
        bool, typer.Option(help="Fetch nothing.", rich_help_panel=_RELEASED)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Generate a LoRA file from one or several photos of a subject."""
    from hyperlora.pipelines.config import GenerationConfig, LoraSampling

    output_path = _check_paths(photos or [], input_dir, output)
    if ray and input_dir is None:
        raise InvalidArgumentError("--ray is for many subjects: give --input-dir FOLDER too")
    config = GenerationConfig(
        format=cast("FormatChoice", format),
        rank=rank,
        strength=strength,
        refine_steps=refine_steps,
        sampling=LoraSampling(seed, lora_sampling_steps, lora_guidance_scale),
        num_candidates=num_candidates,
        refine_method=cast("RefineMethod | None", refine_method),
        num_loras=num_loras,
    )
    if input_dir is not None:
        config.check_folder(use_ray=ray is not None)

    from hyperlora import pretrained
    from hyperlora.cli.options import load_model_and_reranker, print_facts
    from hyperlora.compute import ComputeConfig
    from hyperlora.cpu import disable_malloc_trim
    from hyperlora.data.images import read_image
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.pipelines.auto import DEFAULT_METHOD
    from hyperlora.pipelines.generate import generate_files
    from hyperlora.pipelines.generate_folder import generate_folder
    from hyperlora.pipelines.released.released_model import ReleasedOptions

    disable_malloc_trim()
    # a photo that cannot be read is an error before any model is loaded
    images = [read_image(photo) for photo in photos or []]
    base_name_or_path = base or pretrained.BASE_DIR
    # with Ray this process only plans; each worker looks for the device on its own machine
    compute = compute_options.make_config() if ray is None else ComputeConfig(device="cpu")
    diffusion_base = None
    if config.needs_base:
        diffusion_base = load_diffusion_base(base_name_or_path, compute)
    released_options = ReleasedOptions(
        revision=revision,
        offline=offline,
        face_pack=face_pack,
        encoder=encoder,
        trust_remote_code=trust_remote_code,
    )
    image_to_lora, reranker = load_model_and_reranker(
        model, method, diffusion_base, config, judge, compute, released_options
    )
    print_facts(image_to_lora)
    if input_dir is None:
        records = generate_files(
            image_to_lora, photos or [], output_path, config, diffusion_base, images, reranker
        )
    else:
        batch_generator = None
        if ray is not None:
            from hyperlora.pipelines.generate_ray import make_ray_batch_generator

            bundled_model = pretrained.MODEL_DIR_BY_METHOD[method or DEFAULT_METHOD]
            batch_generator = make_ray_batch_generator(
                ray,
                str(model or bundled_model),
                str(base_name_or_path) if refine_steps else None,
                config,
                asdict(compute_options),
                released_options,
            )
            typer.echo(f"running in Ray workers, device {compute_options.device}", err=True)
        records = generate_folder(
            image_to_lora,
            input_dir,
            output_path,
            config,
            diffusion_base,
            batch_size,
            batch_generator,
            reranker,
        )
    architecture = image_to_lora.make_metadata("", []).architecture
    warn_of_lost_readers(image_to_lora.layout, config.format, architecture)
    rank_and_base = f"rank {rank or image_to_lora.layout.rank} for {image_to_lora.layout.base}"
    _report_records(records, output_path, input_dir, config, as_json, rank_and_base)


def _check_paths(photos: list[Path], input_dir: Path | None, output: Path | None) -> Path:
    """Check that there is one kind of input and that the output can be written; return it."""
    from hyperlora.cli.options import check_output_dir, check_output_file
    from hyperlora.data.images import is_within

    if output is None:
        raise InvalidArgumentError(
            "where should the LoRA go? Give -o FILE (or -o FOLDER with --input-dir)"
        )
    if (input_dir is None) == (not photos):
        raise InvalidArgumentError(
            "give photos of one subject, or --input-dir FOLDER, and not both"
        )
    if input_dir is None:
        check_output_file(output, ".safetensors")
    elif is_within(output, input_dir):
        raise InvalidArgumentError(
            f"{str(output)!r} lies in {str(input_dir)!r} and would count as a subject: "
            "write somewhere else"
        )
    else:
        check_output_dir(output)
    return output


def _report_records(
    records: "list[GenerationRecord]",
    output: Path,
    input_dir: Path | None,
    config: "GenerationConfig",
    as_json: bool,
    rank_and_base: str,
) -> None:
    """Print warnings and skipped photos on stderr, and the files on stdout."""
    for record in records if input_dir else records[:1]:
        for warning in record.warnings:
            typer.echo(f"warning: {replace_unprintable(record.subject)}: {warning}", err=True)
    if as_json:
        rows = [asdict(record) for record in records]
        typer.echo(json.dumps(rows if input_dir or config.num_loras > 1 else rows[0]))
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
        for record in records:
            file = output.with_name(str(record.file))
            typer.echo(f"{file}: {rank_and_base}, {record.seconds:.2f} s")
            if record.negative_file:
                negative_file = output.with_name(record.negative_file)
                typer.echo(f"{negative_file}: for the negative branch of guidance (render uses it)")
    else:
        typer.echo(
            f"{len(records) - len(failed)} LoRAs and index.jsonl in {output}, "
            f"{len(failed)} photos skipped"
        )
