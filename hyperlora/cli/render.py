"""``hyperlora render``."""

from pathlib import Path
from typing import Annotated

import typer


def render(
    prompt: Annotated[str, typer.Option(help="What to draw, with the LoRA's trigger phrase.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG to write.")],
    lora: Annotated[list[str] | None, typer.Option(help="FILE or FILE:WEIGHT; repeat to add several.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model: folder or hub id.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    guidance: Annotated[float, typer.Option(min=0, max=100)] = 3.0,
    negative_prompt: Annotated[str, typer.Option()] = "",
) -> None:
    """Draw a prompt with LoRA files on their base."""
    from contextlib import ExitStack

    from hyperlora import bundle
    from hyperlora.adapters import injected
    from hyperlora.cli.output import require_file
    from hyperlora.formats import load_lora
    from hyperlora.heap import keep_heap
    from hyperlora.pipelines import load_base
    from hyperlora.pipelines import render as draw

    require_file(out, ".png")
    keep_heap()
    chosen = [_weighted(text) for text in lora or []]
    model = load_base(base or bundle.BASE)
    with ExitStack() as stack:  # several files add up, also where they change different sites
        for path, weight in chosen:
            file = load_lora(path, modules=model.modules)
            if (made_for := file.header.base_model) not in ("", model.id):
                typer.echo(f"note: {path.name} was made for {made_for!r}, not for this base {model.id!r}", err=True)
            stack.enter_context(injected(model.modules, file.weights * weight))
        (image,) = draw(model, [prompt], seeds=[seed], steps=steps, guidance=guidance, negative_prompt=negative_prompt)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    image.save(part, "PNG")
    part.replace(out)
    typer.echo(str(out))


def _weighted(text: str) -> tuple[Path, float]:
    """``FILE`` or ``FILE:WEIGHT``."""
    from hyperlora.errors import BadRequest

    path, _, weight = text.rpartition(":")
    if not path or Path(text).exists():
        return Path(text), 1.0
    try:
        number = float(weight)
    except ValueError:
        return Path(text), 1.0
    if not abs(number) <= 10:
        raise BadRequest(f"LoRA weight between -10 and 10 expected, got {weight!r} in {text!r}")
    return Path(path), number
