"""``hyperlora edit``."""

from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import typer
from typer.core import TyperCommand

from hyperlora.cli.compute_options import (
    ComputeOptions,
    add_compute_options,
    warn_of_black_images,
)
from hyperlora.cli.options import FORMAT_HELP, replace_unprintable, warn_of_lost_readers
from hyperlora.errors import InvalidArgumentError
from hyperlora.seeds import MAX_SEED

if TYPE_CHECKING:
    from hyperlora.lora.io.formats import FormatChoice

_PAIR_SEPARATOR: Final = "\n"
"""Joins the two paths of ``--pair``, which typer hands over as one value."""
_IMAGES = "Images to edit"
_SEARCH = "Instruction search"


class EditCommand(TyperCommand):
    """A command with ``--pair BEFORE AFTER``, repeated, and ``--images IMAGE...``.

    Typer's repeated options take one value each. So the two paths of a pair become two lines of one
    value, and each image gets an option of its own.
    """

    def parse_args(
        self,
        ctx: Any,  # noqa: ANN401 - typer keeps its Context private
        args: list[str],
    ) -> list[str]:
        """Rewrite ``--pair`` and ``--images`` for typer.

        Args:
            ctx: The context of the command line.
            args: The arguments as the user wrote them.

        Returns:
            The arguments that are left after parsing.

        Raises:
            InvalidArgumentError: ``--pair`` has fewer than two values.
        """
        argv: list[str] = []
        remaining = list(args)
        while remaining:
            option = remaining.pop(0)
            values = list(takewhile(lambda arg: not arg.startswith("-"), remaining))
            if option == "--pair":
                if len(values) < 2:
                    raise InvalidArgumentError("--pair needs two images: --pair BEFORE AFTER")
                argv += [option, _PAIR_SEPARATOR.join(values[:2])]
                del remaining[:2]
            elif option == "--images" and values:
                argv += [part for value in values for part in (option, value)]
                del remaining[: len(values)]
            else:
                argv.append(option)
        return super().parse_args(ctx, argv)


@add_compute_options("fewer --images")
def edit(
    *,
    compute_options: ComputeOptions,
    before: Annotated[
        Path | None, typer.Argument(help="Image before the edit.", show_default=False)
    ] = None,
    after: Annotated[
        Path | None, typer.Argument(help="The same image after it.", show_default=False)
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(metavar="BEFORE AFTER", help="Another pair of the same edit; repeat."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="LoRA file of the edit to write.")
    ] = None,
    format: Annotated[str, typer.Option(help=FORMAT_HELP)] = "auto",
    strength: Annotated[
        float, typer.Option(help="Factor of the edit, from -10 to 10; below 0 undoes it.")
    ] = 1.0,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="Swap before and after: undo the edit.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Model from before/after pairs: folder or hub id, also LoRWeB."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base that edits images: folder or hub id.")
    ] = None,
    image_paths: Annotated[
        list[Path] | None,
        typer.Option(
            "--images",
            metavar="IMAGE...",
            help="Images to edit in the same way.",
            rich_help_panel=_IMAGES,
        ),
    ] = None,
    images_dir: Annotated[
        Path, typer.Option(help="Folder for the edited images.", rich_help_panel=_IMAGES)
    ] = Path("edited"),
    preserve_unedited: Annotated[
        bool,
        typer.Option(
            "--preserve/--no-preserve",
            help="Copy the regions that the edit leaves unchanged from the input image.",
            rich_help_panel=_IMAGES,
        ),
    ] = True,
    instruction: Annotated[
        str,
        typer.Option(
            help="Text instruction that the base follows as well.", rich_help_panel=_IMAGES
        ),
    ] = "",
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Denoising steps; the model's own by default.",
            rich_help_panel=_IMAGES,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=MAX_SEED, help="Seed of the noise.", rich_help_panel=_IMAGES),
    ] = 0,
    candidate_prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--candidate-prompt",
            metavar="PROMPT",
            help="An instruction that the base understands and the network may not predict; "
            "repeat.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    no_search: Annotated[
        bool,
        typer.Option(
            "--no-search",
            help="One forward pass: try no instructions on the base, which -o then does not need.",
            rich_help_panel=_SEARCH,
        ),
    ] = False,
) -> None:
    """Generate a LoRA from an image before and after an edit, and edit other images with it."""
    from dataclasses import replace

    from hyperlora.cli.edit_by_sheet import SheetDrawing, check_sheet_counts, edit_by_sheets
    from hyperlora.cli.options import check_output_dir, check_output_file, save_image
    from hyperlora.pipelines.config import EditConfig

    pair_paths = _collect_pairs(before, after, pair or [])
    if output is None and not image_paths:
        raise InvalidArgumentError(
            "what should become of the edit? Give -o FILE, or --images IMAGE, or both"
        )
    config = EditConfig(
        format=cast("FormatChoice", format),
        strength=strength,
        reverse=reverse,
        search=not no_search,
        candidate_prompts=tuple(candidate_prompts or ()),
    )
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
    from hyperlora.pipelines.edit import generate_edit_lora
    from hyperlora.pipelines.input_checks import check_pair
    from hyperlora.pipelines.pair_to_lora import PairToLora
    from hyperlora.pipelines.released.lorweb import LorwebModel, find_lorweb
    from hyperlora.pipelines.released.released_model import ReleasedOptions

    disable_malloc_trim()
    # an image that cannot be read is an error before any model is loaded
    image_pairs = [read_image_pair(*paths) for paths in pair_paths]
    input_images = [read_image(path) for path in image_paths or []]
    for paths, image_pair in zip(pair_paths, image_pairs, strict=True):
        names = replace_unprintable(", ".join(path.name for path in paths))
        for warning in check_pair(*image_pair):
            typer.echo(f"warning: {names}: {warning}", err=True)
    compute = compute_options.make_config()
    if model is not None and (lorweb_files := find_lorweb(model)) is not None:
        check_sheet_counts(len(pair_paths), len(input_images), output, config)
        result_paths = _make_output_paths(image_paths or [], images_dir)
        edit_by_sheets(
            LorwebModel.from_files(*lorweb_files, ReleasedOptions(), compute),
            pair_paths[0],
            list(zip(image_paths or [], result_paths, strict=True)),
            output,
            config,
            SheetDrawing(base, instruction, steps, seed),
            compute,
        )
        return
    edit_base = None
    if image_paths:
        edit_base = load_diffusion_base(base or pretrained.EDIT_BASE_DIR, compute)
    pair_to_lora = PairToLora.from_pretrained(
        model or pretrained.PAIR_TO_LORA_DIR, base=edit_base, compute=compute
    )
    lora = generate_edit_lora(pair_to_lora, image_pairs, config, edit_base or base, compute)
    if output is not None:
        metadata = pair_to_lora.make_metadata(output.stem, pair_paths)
        replace(lora, metadata=metadata).save(output, format=config.format)
        warn_of_lost_readers(lora.weights.layout, config.format, metadata.architecture)
        layout = lora.weights.layout
        typer.echo(f"{output}: rank {layout.rank} for {layout.base}")
    if edit_base is not None:
        edited_images = edit_images(
            edit_base,
            input_images,
            lora.weights,
            seeds=[seed] * len(input_images),
            instructions=instruction,
            num_inference_steps=steps or pair_to_lora.num_inference_steps,
            preserve_unedited=preserve_unedited,
        )
        warn_of_black_images(edited_images, compute)
        output_paths = _make_output_paths(image_paths or [], images_dir)
        for path, edited_image in zip(output_paths, edited_images, strict=True):
            save_image(edited_image, path)
            typer.echo(str(path))


def _collect_pairs(
    before: Path | None, after: Path | None, extra_pairs: list[str]
) -> list[tuple[Path, Path]]:
    """Return the pair of the arguments and those of ``--pair``."""
    if (before is None) != (after is None):
        raise InvalidArgumentError(
            "one image given: an image before and one after the edit are expected"
        )
    pairs = [(before, after)] if before is not None and after is not None else []
    pairs += [_split_pair(joined_paths) for joined_paths in extra_pairs]
    if not pairs:
        raise InvalidArgumentError("no pair given: name an image before and one after the edit")
    return pairs


def _split_pair(joined_paths: str) -> tuple[Path, Path]:
    before, _, after = joined_paths.partition(_PAIR_SEPARATOR)
    return Path(before), Path(after)


def _make_output_paths(image_paths: list[Path], output_dir: Path) -> list[Path]:
    """Return ``output_dir/STEM.png`` for each image, numbered where stems repeat."""
    output_paths: list[Path] = []
    for path in image_paths:
        output_path, number = output_dir / f"{path.stem}.png", 2
        while output_path in output_paths:
            output_path = output_dir / f"{path.stem}-{number}.png"
            number += 1
        output_paths.append(output_path)
    return output_paths
