"""``hyperlora render``."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from hyperlora.cli.compute_options import (
    ComputeOptions,
    add_compute_options,
    warn_of_black_images,
)
from hyperlora.cli.options import (
    check_output_file,
    parse_weighted_path,
    replace_unprintable,
    save_image,
)
from hyperlora.errors import InvalidArgumentError
from hyperlora.seeds import MAX_SEED

if TYPE_CHECKING:
    from hyperlora.diffusion.diffusion_base import DiffusionBase
    from hyperlora.diffusion.multi_lora import CompositionConfig, Schedule, Strategy
    from hyperlora.diffusion.regions import Region
    from hyperlora.lora.io.load import LoraFile
    from hyperlora.lora.io.metadata import LoraMetadata
    from hyperlora.lora.weights import LoraWeights

_COMPOSITION = "Several LoRAs"


@add_compute_options("a smaller --width and --height")
def render(
    *,
    compute_options: ComputeOptions,
    prompt: Annotated[
        str,
        typer.Option(help="Prompt with the LoRA's trigger phrase; may contain <lora:NAME:WEIGHT>."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file to write.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="LoRA file as FILE or FILE:WEIGHT; repeat. Without a weight the strength that "
            "the file recommends counts, else 1."
        ),
    ] = None,
    lora_dir: Annotated[
        Path, typer.Option(help="Folder of the LoRA files that <lora:NAME> names.")
    ] = Path("."),
    base: Annotated[str | None, typer.Option(help="Base model: folder or hub id.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the noise.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps; the base's default if not given.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="Classifier-free guidance, 1 for none; the base's default if not given.",
        ),
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="Prompt of what to avoid.")] = "",
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="Sampler by diffusers' name, e.g. LCM or DPMSolverMultistepKarras; a wrong one "
            "lists those of the base."
        ),
    ] = None,
    negative_lora: Annotated[
        str | None,
        typer.Option(
            help="LoRA on the negative branch of guidance: same, off, or another file.",
            show_default="what the header of the only LoRA asks for, else same",
            rich_help_panel=_COMPOSITION,
        ),
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=8, help="Pixels; the base's resolution by default.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Likewise.")] = None,
    strategy: Annotated[
        str,
        typer.Option(
            help="merge, switch, composite or spatial (one LoRA per region).",
            rich_help_panel=_COMPOSITION,
        ),
    ] = "merge",
    region: Annotated[
        list[str] | None,
        typer.Option(
            help="LEFT,TOP,RIGHT,BOTTOM from 0 to 1, or a mask image; one per LoRA (spatial).",
            rich_help_panel=_COMPOSITION,
        ),
    ] = None,
    windowed: Annotated[
        bool,
        typer.Option(
            help="Denoise each region as an image of its own (spatial).",
            rich_help_panel=_COMPOSITION,
        ),
    ] = False,
    switch_every: Annotated[
        int,
        typer.Option(
            min=1, help="Steps until the next LoRA (switch).", rich_help_panel=_COMPOSITION
        ),
    ] = 5,
    gamma: Annotated[
        float | None,
        typer.Option(
            help="AutoLoRA guidance: 0 is the base, 1 the LoRA, more exaggerates it.",
            rich_help_panel=_COMPOSITION,
        ),
    ] = None,
) -> None:
    """Generate an image with LoRA files on their base model."""
    check_output_file(output, ".png")
    weighted_paths = [parse_weighted_path(text) for text in lora or []]

    from functools import partial

    from hyperlora import pretrained
    from hyperlora.cpu import disable_malloc_trim
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.diffusion.lora_prompt_syntax import (
        check_no_lora_tags,
        compute_tag_scales,
        load_tagged_loras,
        parse_lora_tags,
    )
    from hyperlora.diffusion.multi_lora import CompositionConfig
    from hyperlora.diffusion.text_to_image import generate_images
    from hyperlora.lora.io.find import find_lora
    from hyperlora.lora.io.prompt_prefix import add_prompt_prefixes, read_lora_metadata

    text, lora_tags = parse_lora_tags(prompt)
    check_no_lora_tags([negative_prompt], "negative prompt")
    is_constant = all(tag.is_constant for tag in lora_tags)
    regions = [_parse_region(text) for text in region] if region else None
    if gamma is not None and (strategy != "merge" or not is_constant):
        raise InvalidArgumentError(
            "--gamma guides the sum of all LoRAs: use it with --strategy merge and without steps"
        )
    is_sum = strategy == "merge" and is_constant and gamma is None
    if negative_lora not in (None, "same") and not is_sum:
        raise InvalidArgumentError(
            "--negative-lora is for the sum of all LoRAs: use it with --strategy merge, without "
            "--gamma and without steps in prompts"
        )
    disable_malloc_trim()
    compute = compute_options.make_config()
    diffusion_base = load_diffusion_base(base or pretrained.BASE_DIR, compute)
    files = [_load_lora_for_base(path, diffusion_base) for path, _ in weighted_paths]
    tagged_paths = [find_lora(lora_dir, tag.name) for tag in lora_tags]
    metadata = [file.metadata for file in files] + [read_lora_metadata(p) for p in tagged_paths]
    text = add_prompt_prefixes(text, metadata)
    loras = [file.weights for file in files]
    loras += load_tagged_loras(lora_tags, lora_dir, diffusion_base.modules)
    loras = [lora.to(diffusion_base.device) for lora in loras]
    weights = [
        file.metadata.recommended_strength if weight is None else weight
        for file, (_, weight) in zip(files, weighted_paths, strict=True)
    ] + [1.0] * len(lora_tags)
    if negative_lora is None and is_sum and len(metadata) == 1:
        path = [*(path for path, _ in weighted_paths), *tagged_paths][0]
        weight = weights[0] * (lora_tags[0].denoiser_weight if lora_tags else 1.0)
        negative_lora = _choose_negative_lora(metadata[0], path, weight)
    schedule = None
    if not is_constant:
        schedule = partial(compute_tag_scales, lora_tags, num_constant=len(weighted_paths))
    config = CompositionConfig(switch_every=switch_every, regions=regions, windowed=windowed)
    if negative_lora in (None, "same"):
        lora_context = _apply_loras(
            diffusion_base, loras, weights, cast("Strategy", strategy), gamma, schedule, config
        )
    else:
        lora_context = _apply_loras_by_branch(diffusion_base, loras, weights, str(negative_lora))
    with lora_context:
        (image,) = generate_images(
            diffusion_base,
            [text],
            seeds=[seed],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            scheduler=scheduler,
        )
    warn_of_black_images([image], compute)
    save_image(image, output)
    typer.echo(str(output))


def _apply_loras(
    diffusion_base: "DiffusionBase",
    loras: "list[LoraWeights]",
    weights: list[float],
    strategy: "Strategy",
    gamma: float | None,
    schedule: "Schedule | None",
    config: "CompositionConfig",
) -> AbstractContextManager[None]:
    """Return the context to generate in: LoRAs by their strategy, or AutoLoRA by their sum."""
    from contextlib import nullcontext

    from hyperlora.diffusion.autolora_guidance import apply_autolora_guidance
    from hyperlora.diffusion.multi_lora import compose_loras
    from hyperlora.lora.merge import merge

    if not loras:
        return nullcontext()
    if gamma is not None:
        return apply_autolora_guidance(diffusion_base.pipeline, merge(loras, weights), gamma)
    return compose_loras(
        diffusion_base.pipeline, loras, strategy, weights, schedule=schedule, config=config
    )


def _choose_negative_lora(metadata: "LoraMetadata", path: Path, weight: float) -> str:
    """Return what the header of a LoRA file asks for, as ``--negative-lora`` takes it; say it."""
    from hyperlora.lora.io.negative_lora import (
        describe_negative_rule,
        get_negative_rule,
        make_negative_path,
    )

    rule, negative_path = get_negative_rule(metadata), make_negative_path(path)
    has_file = negative_path.is_file()
    if sentence := describe_negative_rule(path.stem, rule, has_file):
        typer.echo(f"note: {replace_unprintable(sentence)}", err=True)
    if rule == "gray":
        return f"{negative_path}:{weight}" if has_file else "same"
    return rule


def _apply_loras_by_branch(
    diffusion_base: "DiffusionBase",
    loras: "list[LoraWeights]",
    weights: list[float],
    negative_lora: str,
) -> AbstractContextManager[None]:
    """Return the context to generate in: the sum of LoRAs, with another one on negative branches.

    ``negative_lora`` is ``off`` or ``FILE`` or ``FILE:WEIGHT``.
    """
    from hyperlora.diffusion.negative_lora import inject_lora_by_branch
    from hyperlora.lora.merge import merge

    if not loras:
        raise InvalidArgumentError(
            "--negative-lora needs a LoRA on the positive branch: give --lora"
        )
    other = None
    if negative_lora != "off":
        path, weight = parse_weighted_path(negative_lora)
        file = _load_lora_for_base(path, diffusion_base)
        other = file.weights.to(diffusion_base.device) * (1.0 if weight is None else weight)
    return inject_lora_by_branch(diffusion_base.pipeline, merge(loras, weights), other)


def _load_lora_for_base(path: Path, diffusion_base: "DiffusionBase") -> "LoraFile":
    """Load a LoRA file; note on stderr if it is for another base of the same shape."""
    from hyperlora.lora.io.load import load_lora

    lora_file = load_lora(path, modules=diffusion_base.modules, base_id=diffusion_base.id)
    for note in lora_file.notes:
        typer.echo(f"note: {replace_unprintable(path.name)}: {note}", err=True)
    if (trained_base := lora_file.metadata.base_model) not in ("", diffusion_base.id):
        typer.echo(
            f"note: {replace_unprintable(path.name)} was made for {trained_base!r}, "
            f"not for this base {diffusion_base.id!r}",
            err=True,
        )
    return lora_file


def _parse_region(text: str) -> "Region":
    """Parse a box, or read a mask image."""
    if Path(text).is_file():
        from hyperlora.data.images import read_image

        return read_image(Path(text))
    try:
        left, top, right, bottom = (float(number) for number in text.split(","))
    except ValueError:
        raise InvalidArgumentError(
            f"region {text!r} is neither LEFT,TOP,RIGHT,BOTTOM in 0..1 nor an image file"
        ) from None
    return left, top, right, bottom
