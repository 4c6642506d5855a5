"""``main_callback render``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hyperlora.cli.options import parse_weighted_path

if TYPE_CHECKING:
    from hyperlora.diffusion.diffusion_base import DiffusionBase
    from hyperlora.lora.weights import LoraWeights


def render(
    prompt: Annotated[
        str,
        typer.Option(help="What to draw, with the LoRA's trigger phrase; may hold <lora:NAME:W>."),
    ],
    output: Annotated[Path, typer.Option("-o", "--out", help="PNG to write.")],
    lora: Annotated[
        list[str] | None, typer.Option(help="FILE or FILE:WEIGHT; repeat for several.")
    ] = None,
    lora_dir: Annotated[
        Path, typer.Option(help="Where <lora:NAME> in the prompt is looked up.")
    ] = Path("."),
    strategy: Annotated[str, typer.Option(help="merge, switch, composite or spatial.")] = "merge",
    region: Annotated[
        list[str] | None,
        typer.Option(
            help="LEFT,TOP,RIGHT,BOTTOM in 0..1, or a mask image; one per LoRA (spatial)."
        ),
    ] = None,
    windowed: Annotated[
        bool, typer.Option(help="Draw each region as a picture of its own (spatial).")
    ] = False,
    switch_every: Annotated[
        int, typer.Option(min=1, help="Steps before the next LoRA (switch).")
    ] = 5,
    gamma: Annotated[
        float | None, typer.Option(help="AutoLoRA guidance: 0 base, 1 LoRA, above goes beyond.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="DiffusionBase model: folder or hub id.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    guidance_scale: Annotated[float, typer.Option(min=0, max=100)] = 3.0,
    negative_prompt: Annotated[str, typer.Option()] = "",
    width: Annotated[
        int | None, typer.Option(min=8, help="Pixels; the base's own size if not given.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=8)] = None,
) -> None:
    """Draw a prompt with LoRA files on their base."""
    from functools import partial

    from hyperlora import pretrained
    from hyperlora.cli.options import check_output_file, save_image
    from hyperlora.cpu import disable_malloc_trim
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.diffusion.lora_prompt_syntax import (
        compute_tag_scales,
        load_tagged_loras,
        parse_lora_tags,
    )
    from hyperlora.diffusion.text_to_image import generate_images as draw
    from hyperlora.errors import InvalidArgumentError

    check_output_file(output, ".png")
    weighted_paths = [parse_weighted_path(text) for text in lora or []]
    text, lora_tags = parse_lora_tags(prompt)
    regions = [_parse_region(r) for r in region] if region else None
    if gamma is not None and (strategy != "merge" or any(not m.is_constant for m in lora_tags)):
        raise InvalidArgumentError(
            "--gamma guides the sum of all LoRAs: use it with --strategy merge and without steps"
        )
    disable_malloc_trim()
    diffusion_base = load_diffusion_base(base or pretrained.BASE_DIR)
    loras = [
        _load_lora_for_base(path, diffusion_base) for path, _ in weighted_paths
    ] + load_tagged_loras(lora_tags, lora_dir, diffusion_base.modules)
    weights = [weight for _, weight in weighted_paths] + [1.0] * len(lora_tags)
    schedule = (
        partial(compute_tag_scales, lora_tags, num_constant=len(weighted_paths))
        if any(not m.is_constant for m in lora_tags)
        else None
    )
    compose_options: Any = {
        "regions": regions,
        "window": windowed,
        "every": switch_every,
        "schedule": schedule,
    }
    with _apply_loras(diffusion_base, loras, weights, strategy, gamma, compose_options):
        (image,) = draw(
            diffusion_base,
            [text],
            seeds=[seed],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
        )
    save_image(image, output)
    typer.echo(str(output))


def _apply_loras(
    diffusion_base: "DiffusionBase",
    loras: "list[LoraWeights]",
    weights: list[float],
    strategy: Any,
    gamma: float | None,
    compose_options: Any,
) -> Any:
    """The context to draw in: all files by their strategy, or guided by their sum."""
    from contextlib import nullcontext

    from hyperlora.diffusion.autolora_guidance import apply_autolora_guidance
    from hyperlora.diffusion.multi_lora import compose_loras
    from hyperlora.lora.merge import merge

    if not loras:
        return nullcontext()
    if gamma is not None:
        return apply_autolora_guidance(diffusion_base.pipeline, merge(loras, weights), gamma)
    return compose_loras(diffusion_base.pipeline, loras, strategy, weights, **compose_options)


def _load_lora_for_base(path: Path, diffusion_base: "DiffusionBase") -> "LoraWeights":
    from hyperlora.lora.io.load import load_lora

    lora_file = load_lora(path, modules=diffusion_base.modules)
    if (trained_base := lora_file.metadata.base_model) not in ("", diffusion_base.id):
        typer.echo(
            f"note: {path.name} was made for {trained_base!r}, not for this base {diffusion_base.id!r}",
            err=True,
        )
    return lora_file.weights


def _parse_region(text: str) -> Any:
    from hyperlora.errors import InvalidArgumentError

    if Path(text).is_file():
        from hyperlora.data.images import read_image

        return read_image(Path(text))
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise InvalidArgumentError(
            f"region {text!r} is neither LEFT,TOP,RIGHT,BOTTOM in 0..1 nor an image file"
        ) from None
