"""``main_callback edit``."""

from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hyperlora.errors import InvalidArgumentError


class EditCommand(TyperCommand):
    """``--pair BEFORE AFTER``, as often as wanted, and ``--image_paths IMAGE...``: typer's repeated options take one value
    each, so the two of a pair go as two lines, and each image under an option of its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        argv: list[str] = []
        remaining = list(args)
        while remaining:
            option = remaining.pop(0)
            values = list(takewhile(lambda arg: not arg.startswith("-"), remaining))
            if option == "--pair":
                if len(values) < 2:
                    raise InvalidArgumentError("--pair needs two pictures: --pair BEFORE AFTER")
                argv += [option, "\n".join(values[:2])]
                del remaining[:2]
            elif option == "--apply" and values:
                argv += [part for value in values for part in (option, value)]
                del remaining[: len(values)]
            else:
                argv.append(option)
        return super().parse_args(ctx, argv)


def edit(
    before: Annotated[
        Path | None, typer.Argument(help="Picture before the edit.", show_default=False)
    ] = None,
    after: Annotated[
        Path | None, typer.Argument(help="The same picture after it.", show_default=False)
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(metavar="BEFORE AFTER", help="A further pair of the same edit; repeat."),
    ] = None,
    image_paths: Annotated[
        list[Path] | None, typer.Option(metavar="IMAGE...", help="Pictures to edit alike.")
    ] = None,
    images_dir: Annotated[Path, typer.Option(help="Folder for the edited pictures.")] = Path(
        "edited"
    ),
    output: Annotated[
        Path | None, typer.Option("-o", "--out", help="LoRA file of the change to write.")
    ] = None,
    strength: Annotated[
        float, typer.Option(help="How much of the change; below 0 undoes it.")
    ] = 1.0,
    reverse: Annotated[bool, typer.Option("--reverse", help="Undo the change instead.")] = False,
    no_preserve: Annotated[
        bool,
        typer.Option(
            "--repaint", help="Repaint what the change leaves alone too, as the LoRA file does."
        ),
    ] = False,
    instruction: Annotated[
        str, typer.Option(help="Words besides, if the base should also follow some.")
    ] = "",
    candidate_prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            metavar="WORDS",
            help="What else the base may know and the network cannot say; repeat.",
        ),
    ] = None,
    no_search: Annotated[
        bool, typer.Option("--one-pass", help="Try no words; needs no base for -o.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps; the model's own if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a PairToLora model.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base of edits (InstructPix2Pix): folder or hub id.")
    ] = None,
    format: Annotated[str, typer.Option(help="diffusers or kohya.")] = "diffusers",
) -> None:
    """A picture before and after an edit in, the LoRA of the change out; and the same edit on other pictures."""
    from hyperlora.cli.options import check_output_dir, check_output_file, save_image

    pairs = _collect_pairs(before, after, pair or [])
    if output is None and not image_paths:
        raise InvalidArgumentError(
            "what should become of the change? Give -o FILE, or --apply IMAGE, or both"
        )
    if format not in ("diffusers", "kohya"):
        raise InvalidArgumentError(f"unknown format {format!r}; known: diffusers, kohya")
    if candidate_prompts and no_search:
        raise InvalidArgumentError(
            "--try and --one-pass given: trying words takes more than one pass, so leave one out"
        )
    if not -10 <= strength <= 10:  # also refuses NaN
        raise InvalidArgumentError(f"strength between -10 and 10 expected, got {strength}")
    if output is not None:
        check_output_file(output, ".safetensors")
    if image_paths:
        check_output_dir(images_dir)

    from hyperlora import pretrained
    from hyperlora.cpu import disable_malloc_trim
    from hyperlora.data.edit_pairs import read_image_pair
    from hyperlora.data.images import read_image
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.diffusion.image_editing import edit_images
    from hyperlora.lora.io.save import save_lora
    from hyperlora.pipelines.input_checks import check_pair
    from hyperlora.pipelines.instruction_search import generate_with_search
    from hyperlora.pipelines.pair_to_lora import PairToLora, make_edit_metadata

    disable_malloc_trim()
    image_pairs = [
        read_image_pair(*paths) for paths in pairs
    ]  # a bad picture is told before any model is loaded
    input_images = [read_image(path) for path in image_paths or []]
    for paths, image_pair in zip(pairs, image_pairs, strict=True):
        for warning in check_pair(*image_pair):
            typer.echo(f"warning: {paths[0].name}, {paths[1].name}: {warning}", err=True)
    edit_base = load_diffusion_base(base or pretrained.EDIT_BASE_DIR) if image_paths else None
    pair_to_lora = PairToLora.from_pretrained(model or pretrained.PAIR_TO_LORA_DIR, base=edit_base)
    directed_pairs = [pair[::-1] for pair in image_pairs] if reverse else image_pairs
    search_prompts = (
        [] if no_search else [*pair_to_lora.zero_shot_prompts, *(candidate_prompts or [])]
    )
    if search_prompts:
        lora = generate_with_search(
            pair_to_lora,
            edit_base or _load_search_base(pair_to_lora, base),
            directed_pairs,
            strength,
            search_prompts,
        )
    else:
        lora = pair_to_lora(directed_pairs, strength)
    if output is not None:
        metadata = make_edit_metadata(pair_to_lora, output.stem, pairs)
        save_lora(lora, output, format=format, metadata=metadata)  # type: ignore[arg-type]
        typer.echo(f"{output}: rank {lora.layout.rank} for {lora.layout.base}")
    if edit_base is not None:
        seeds = [seed] * len(input_images)
        edited_images = edit_images(
            edit_base,
            input_images,
            lora,
            seeds=seeds,
            instructions=instruction,
            num_inference_steps=steps or pair_to_lora.num_inference_steps,
            preserve_unedited=not no_preserve,
        )
        for path, edited_image in zip(
            _make_output_paths(image_paths or [], images_dir), edited_images, strict=True
        ):
            save_image(edited_image, path)
            typer.echo(str(path))


def _load_search_base(pair_to_lora: Any, base_name: str | None) -> Any:
    """The base that words are tried with, where none is loaded yet."""
    from hyperlora import pretrained
    from hyperlora.diffusion.diffusion_base import get_base_id, load_diffusion_base
    from hyperlora.pipelines.instruction_search import NO_INSTRUCTION_HEAD

    if pair_to_lora.network.wording is None:
        raise InvalidArgumentError(NO_INSTRUCTION_HEAD)
    if base_name is None and pair_to_lora.layout.base != get_base_id(pretrained.EDIT_BASE_DIR):
        raise InvalidArgumentError(
            f"words are tried with the base of the LoRA, {pair_to_lora.layout.base!r}: give --base or --one-pass"
        )
    edit_base = load_diffusion_base(base_name or pretrained.EDIT_BASE_DIR)
    pair_to_lora.layout.require_base(edit_base.id)
    return edit_base


def _collect_pairs(
    before: Path | None, after: Path | None, extra_pairs: list[str]
) -> list[tuple[Path, Path]]:
    if (before is None) != (after is None):
        raise InvalidArgumentError(
            "one picture given: a picture before and one after the edit are expected"
        )
    pairs = [
        *([(before, after)] if before is not None and after is not None else []),
        *map(_split_pair, extra_pairs),
    ]
    if not pairs:
        raise InvalidArgumentError("no pair given: name a picture before and one after the edit")
    return pairs


def _split_pair(joined_paths: str) -> tuple[Path, Path]:
    before, _, after = joined_paths.partition("\n")
    return Path(before), Path(after)


def _make_output_paths(image_paths: list[Path], output_dir: Path) -> list[Path]:
    """``output_dir/STEM.png`` for each, numbered where two have the same stem."""
    output_paths: list[Path] = []
    for path in image_paths:
        output_path, suffix_number = output_dir / f"{path.stem}.png", 2
        while output_path in output_paths:
            output_path, suffix_number = (
                output_dir / f"{path.stem}-{suffix_number}.png",
                suffix_number + 1,
            )
        output_paths.append(output_path)
    return output_paths
