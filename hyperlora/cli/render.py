"""``hyperlora render``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hyperlora.cli.options import weighted

if TYPE_CHECKING:
    from hyperlora.diffusion.diffusion_base import Base
    from hyperlora.lora.weights import LoraWeights


def render(
    prompt: Annotated[str, typer.Option(help="What to draw, with the LoRA's trigger phrase; may hold <lora:NAME:W>.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG to write.")],
    lora: Annotated[list[str] | None, typer.Option(help="FILE or FILE:WEIGHT; repeat for several.")] = None,
    lora_dir: Annotated[Path, typer.Option(help="Where <lora:NAME> in the prompt is looked up.")] = Path("."),
    strategy: Annotated[str, typer.Option(help="merge, switch, composite or spatial.")] = "merge",
    region: Annotated[
        list[str] | None, typer.Option(help="LEFT,TOP,RIGHT,BOTTOM in 0..1, or a mask image; one per LoRA (spatial).")
    ] = None,
    window: Annotated[bool, typer.Option(help="Draw each region as a picture of its own (spatial).")] = False,
    every: Annotated[int, typer.Option(min=1, help="Steps before the next LoRA (switch).")] = 5,
    gamma: Annotated[float | None, typer.Option(help="AutoLoRA guidance: 0 base, 1 LoRA, above goes beyond.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model: folder or hub id.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    guidance: Annotated[float, typer.Option(min=0, max=100)] = 3.0,
    negative_prompt: Annotated[str, typer.Option()] = "",
    width: Annotated[int | None, typer.Option(min=8, help="Pixels; the base's own size if not given.")] = None,
    height: Annotated[int | None, typer.Option(min=8)] = None,
) -> None:
    """Draw a prompt with LoRA files on their base."""
    from functools import partial

    from hyperlora import pretrained
    from hyperlora.cli.options import require_file, write_picture
    from hyperlora.cpu import keep_heap
    from hyperlora.diffusion.diffusion_base import load_base
    from hyperlora.diffusion.lora_prompt_syntax import called_for, mentions, strengths
    from hyperlora.diffusion.text_to_image import render as draw
    from hyperlora.errors import BadRequest

    require_file(out, ".png")
    chosen = [weighted(text) for text in lora or []]
    text, named = mentions(prompt)
    regions = [_region(r) for r in region] if region else None
    if gamma is not None and (strategy != "merge" or any(not m.always for m in named)):
        raise BadRequest("--gamma guides the sum of all LoRAs: use it with --strategy merge and without steps")
    keep_heap()
    model = load_base(base or pretrained.BASE)
    files = [_loaded(path, model) for path, _ in chosen] + called_for(named, lora_dir, model.modules)
    weights = [weight for _, weight in chosen] + [1.0] * len(named)
    schedule = partial(strengths, named, always=len(chosen)) if any(not m.always for m in named) else None
    options: Any = {"regions": regions, "window": window, "every": every, "schedule": schedule}
    with _composing(model, files, weights, strategy, gamma, options):
        (image,) = draw(
            model,
            [text],
            seeds=[seed],
            steps=steps,
            guidance=guidance,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
        )
    write_picture(image, out)
    typer.echo(str(out))


def _composing(
    model: "Base", files: "list[LoraWeights]", weights: list[float], strategy: Any, gamma: float | None, options: Any
) -> Any:
    """The context to draw in: all files by their strategy, or guided by their sum."""
    from contextlib import nullcontext

    from hyperlora.diffusion.autolora_guidance import autolora
    from hyperlora.diffusion.multi_lora import composed
    from hyperlora.lora.merge import merge

    if not files:
        return nullcontext()
    if gamma is not None:
        return autolora(model.pipeline, merge(files, weights), gamma)
    return composed(model.pipeline, files, strategy, weights, **options)


def _loaded(path: Path, model: "Base") -> "LoraWeights":
    from hyperlora.lora.io.load import load_lora

    file = load_lora(path, modules=model.modules)
    if (made_for := file.header.base_model) not in ("", model.id):
        typer.echo(f"note: {path.name} was made for {made_for!r}, not for this base {model.id!r}", err=True)
    return file.weights


def _region(text: str) -> Any:
    from hyperlora.errors import BadRequest

    if Path(text).is_file():
        from hyperlora.data.images import read_image

        return read_image(Path(text))
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise BadRequest(f"region {text!r} is neither LEFT,TOP,RIGHT,BOTTOM in 0..1 nor an image file") from None
