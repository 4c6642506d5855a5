"""``hyperlora edit``."""

from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hyperlora.errors import BadRequest


class EditCommand(TyperCommand):
    """``--pair BEFORE AFTER``, as often as wanted, and ``--apply IMAGE...``: typer's repeated options take one value
    each, so the two of a pair go as two lines, and each image under an option of its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given: list[str] = []
        rest = list(args)
        while rest:
            option = rest.pop(0)
            values = list(takewhile(lambda arg: not arg.startswith("-"), rest))
            if option == "--pair":
                if len(values) < 2:
                    raise BadRequest("--pair needs two pictures: --pair BEFORE AFTER")
                given += [option, "\n".join(values[:2])]
                del rest[:2]
            elif option == "--apply" and values:
                given += [part for value in values for part in (option, value)]
                del rest[: len(values)]
            else:
                given.append(option)
        return super().parse_args(ctx, given)


def edit(
    before: Annotated[Path | None, typer.Argument(help="Picture before the edit.", show_default=False)] = None,
    after: Annotated[Path | None, typer.Argument(help="The same picture after it.", show_default=False)] = None,
    pair: Annotated[
        list[str] | None, typer.Option(metavar="BEFORE AFTER", help="A further pair of the same edit; repeat.")
    ] = None,
    apply: Annotated[list[Path] | None, typer.Option(metavar="IMAGE...", help="Pictures to edit alike.")] = None,
    images_out: Annotated[Path, typer.Option(help="Folder for the edited pictures.")] = Path("edited"),
    out: Annotated[Path | None, typer.Option("-o", "--out", help="LoRA file of the change to write.")] = None,
    strength: Annotated[float, typer.Option(help="How much of the change; below 0 undoes it.")] = 1.0,
    reverse: Annotated[bool, typer.Option("--reverse", help="Undo the change instead.")] = False,
    repaint: Annotated[
        bool, typer.Option("--repaint", help="Repaint what the change leaves alone too, as the LoRA file does.")
    ] = False,
    instruction: Annotated[str, typer.Option(help="Words besides, if the base should also follow some.")] = "",
    further: Annotated[
        list[str] | None,
        typer.Option("--try", metavar="WORDS", help="What else the base may know and the network cannot say; repeat."),
    ] = None,
    one_pass: Annotated[bool, typer.Option("--one-pass", help="Try no words; needs no base for -o.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; the model's own if not given.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a PairToLora model.")] = None,
    base: Annotated[str | None, typer.Option(help="Base of edits (InstructPix2Pix): folder or hub id.")] = None,
    format: Annotated[str, typer.Option(help="diffusers or kohya.")] = "diffusers",
) -> None:
    """A picture before and after an edit in, the LoRA of the change out; and the same edit on other pictures."""
    from hyperlora.cli.options import require_file, require_folder, write_picture

    pairs = _pairs(before, after, pair or [])
    if out is None and not apply:
        raise BadRequest("what should become of the change? Give -o FILE, or --apply IMAGE, or both")
    if format not in ("diffusers", "kohya"):
        raise BadRequest(f"unknown format {format!r}; known: diffusers, kohya")
    if further and one_pass:
        raise BadRequest("--try and --one-pass given: trying words takes more than one pass, so leave one out")
    if not -10 <= strength <= 10:  # also refuses NaN
        raise BadRequest(f"strength between -10 and 10 expected, got {strength}")
    if out is not None:
        require_file(out, ".safetensors")
    if apply:
        require_folder(images_out)

    from hyperlora import pretrained
    from hyperlora.cpu import keep_heap
    from hyperlora.data.edit_pairs import read_pair
    from hyperlora.data.images import read_image
    from hyperlora.diffusion.diffusion_base import load_base
    from hyperlora.diffusion.image_editing import apply_edit
    from hyperlora.lora.io.save import save_lora
    from hyperlora.pipelines.input_checks import doubts
    from hyperlora.pipelines.instruction_search import tried
    from hyperlora.pipelines.pair_to_lora import PairToLora, change_header

    keep_heap()
    opened = [read_pair(*paths) for paths in pairs]  # a bad picture is told before any model is loaded
    pictures = [read_image(path) for path in apply or []]
    for paths, images in zip(pairs, opened, strict=True):
        for doubt in doubts(*images):
            typer.echo(f"warning: {paths[0].name}, {paths[1].name}: {doubt}", err=True)
    frozen = load_base(base or pretrained.EDIT_BASE) if apply else None
    network = PairToLora.from_pretrained(model or pretrained.PAIR_MODEL, base=frozen)
    shown = [pair[::-1] for pair in opened] if reverse else opened
    words = [] if one_pass else [*network.further, *(further or [])]
    if words:
        change = tried(network, frozen or _base_to_try(network, base), shown, strength, words)
    else:
        change = network(shown, strength)
    if out is not None:
        header = change_header(network, out.stem, pairs)
        save_lora(change, out, format=format, header=header)  # type: ignore[arg-type]
        typer.echo(f"{out}: rank {change.layout.rank} for {change.layout.base}")
    if frozen is not None:
        seeds = [seed] * len(pictures)
        edited = apply_edit(
            frozen, pictures, change, seeds=seeds, instructions=instruction, steps=steps or network.steps,
            keep_rest=not repaint,
        )  # fmt: skip
        for path, picture in zip(_names(apply or [], images_out), edited, strict=True):
            write_picture(picture, path)
            typer.echo(str(path))


def _base_to_try(network: Any, given: str | None) -> Any:
    """The base that words are tried with, where none is loaded yet."""
    from hyperlora import pretrained
    from hyperlora.diffusion.diffusion_base import base_id, load_base
    from hyperlora.pipelines.instruction_search import NO_WORDS

    if network.network.wording is None:
        raise BadRequest(NO_WORDS)
    if given is None and network.layout.base != base_id(pretrained.EDIT_BASE):
        raise BadRequest(
            f"words are tried with the base of the LoRA, {network.layout.base!r}: give --base or --one-pass"
        )
    base = load_base(given or pretrained.EDIT_BASE)
    network.layout.require_base(base.id)
    return base


def _pairs(before: Path | None, after: Path | None, more: list[str]) -> list[tuple[Path, Path]]:
    if (before is None) != (after is None):
        raise BadRequest("one picture given: a picture before and one after the edit are expected")
    pairs = [*([(before, after)] if before is not None and after is not None else []), *map(_two, more)]
    if not pairs:
        raise BadRequest("no pair given: name a picture before and one after the edit")
    return pairs


def _two(lines: str) -> tuple[Path, Path]:
    before, _, after = lines.partition("\n")
    return Path(before), Path(after)


def _names(pictures: list[Path], folder: Path) -> list[Path]:
    """``folder/STEM.png`` for each, numbered where two have the same stem."""
    names: list[Path] = []
    for path in pictures:
        name, n = folder / f"{path.stem}.png", 2
        while name in names:
            name, n = folder / f"{path.stem}-{n}.png", n + 1
        names.append(name)
    return names
