"""``hyperlora edit`` with LoRWeB: one LoRA and one two-by-two sheet per image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import typer

from hyperlora.cli.compute_options import warn_of_black_images
from hyperlora.cli.options import save_image, warn_of_lost_readers
from hyperlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from hyperlora.compute import ComputeConfig
    from hyperlora.pipelines.config import EditConfig
    from hyperlora.pipelines.released.lorweb import LorwebModel


@dataclass(frozen=True)
class SheetDrawing:
    """How edited images are drawn.

    Attributes:
        base: Folder or hub id of the base; None for the model's own, which is then loaded only if
            no LoRA file is asked for.
        instruction: Text that says what the edit is.
        steps: Denoising steps; None for the base's default.
        seed: Seed of the noise.
    """

    base: str | None
    instruction: str
    steps: int | None
    seed: int


def edit_by_sheets(
    model: "LorwebModel",
    pair: tuple[Path, Path],
    images: Sequence[tuple[Path, Path]],
    output: Path | None,
    config: "EditConfig",
    drawing: SheetDrawing,
    compute: "ComputeConfig",
) -> None:
    """Generate the LoRA of every image, write it or edit the image with it.

    Args:
        model: The model.
        pair: The image before and after the edit.
        images: The images to edit, each with the file for the result.
        output: LoRA file to write, for a single image.
        config: Format, strength and direction.
        drawing: Base, instruction, steps and seed.
        compute: Device and precision of the base.

    Raises:
        InvalidArgumentError: The base does not edit images.
        LayoutMismatchError: It is no FLUX.1 Kontext.
    """
    from hyperlora.data.images import read_image
    from hyperlora.diffusion.diffusion_base import load_diffusion_base
    from hyperlora.diffusion.image_editing import check_edit_base
    from hyperlora.lora.io.lora import Lora
    from hyperlora.pipelines.released.lorweb import edit_sheet, make_sheet

    is_reverse = config.reverse != (config.strength < 0)
    before, after = pair[::-1] if is_reverse else pair
    base = None
    if drawing.base or output is None:
        base = load_diffusion_base(drawing.base or model.facts.base, compute)
        check_edit_base(base)
    typer.echo(model.facts.format_notice(), err=True)
    for image_path, result_path in images:
        sheet = make_sheet(*(read_image(path) for path in (before, after, image_path)))
        weights = model.generate(sheet) * abs(config.strength)
        if output is not None:
            metadata = model.make_metadata(output.stem, [before, after, image_path])
            Lora(weights, metadata).save(output, format=config.format, dtype=torch.float16)
            warn_of_lost_readers(weights.layout, config.format, metadata.architecture)
            typer.echo(f"{output}: rank {weights.layout.rank} for {weights.layout.base}")
        if base is not None:
            edited = edit_sheet(
                base,
                sheet,
                weights,
                seed=drawing.seed,
                instruction=drawing.instruction,
                num_inference_steps=drawing.steps,
            )
            warn_of_black_images([edited], compute)
            save_image(edited, result_path)
            typer.echo(str(result_path))


def check_sheet_counts(
    num_pairs: int, num_images: int, output: Path | None, config: "EditConfig"
) -> None:
    """Check that a LoRA of one pair and one image can be meant, before anything is fetched.

    Args:
        num_pairs: Pairs that show the edit.
        num_images: Images to edit.
        output: LoRA file to write, if any.
        config: Candidate prompts.

    Raises:
        InvalidArgumentError: It cannot.
    """
    if num_pairs != 1:
        raise InvalidArgumentError(
            f"LoRWeB makes the LoRA of one pair, {num_pairs} given: leave out --pair"
        )
    if not num_images:
        raise InvalidArgumentError(
            "LoRWeB makes the LoRA of an edit for one image: name the image with --images IMAGE"
        )
    if output is not None and num_images > 1:
        raise InvalidArgumentError(
            f"LoRWeB makes another LoRA for every image, {num_images} given: give one with -o"
        )
    if config.candidate_prompts:
        raise InvalidArgumentError(
            "LoRWeB searches no instructions: leave out --candidate-prompt, or use --instruction"
        )
