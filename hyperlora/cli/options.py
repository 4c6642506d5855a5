"""What several commands share: options, checks of output paths, loading models, image files."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer
from typer.core import TyperCommand

from hyperlora.errors import InvalidArgumentError
from hyperlora.paths import find_path

if TYPE_CHECKING:
    from PIL import Image

    from hyperlora.compute import ComputeConfig
    from hyperlora.diffusion.diffusion_base import DiffusionBase
    from hyperlora.lora.io.formats import FormatChoice
    from hyperlora.lora.layout import LoraLayout
    from hyperlora.pipelines.config import GenerationConfig
    from hyperlora.pipelines.photo_model import AnyPhotoModel
    from hyperlora.pipelines.released.released_model import ReleasedOptions
    from hyperlora.pipelines.rerank import IdentityReranker, ImageJudge

FORMAT_HELP: Final = "Key names of the file: auto, diffusers, kohya, sgm (SDXL) or comfyui (DiTs)."
"""Help of ``--format``; ``auto`` is what most programs read."""
MAX_LORA_WEIGHT: Final = 10.0
"""The largest absolute weight of a LoRA file on the command line."""


def replace_unprintable(text: str) -> str:
    """Replace line breaks and terminal codes, so that a name of a file stays on its line."""
    return "".join(c if c.isprintable() else "�" for c in text)


class RayCommand(TyperCommand):
    """A command whose ``--ray`` takes an address, or stands alone for a cluster on this machine."""

    def parse_args(
        self,
        ctx: Any,  # noqa: ANN401 - typer keeps its Context private
        args: list[str],
    ) -> list[str]:
        """Give ``--ray`` the value ``local`` where it has none.

        Args:
            ctx: The context of the command line.
            args: The arguments as the user wrote them.

        Returns:
            The arguments that are left after parsing.
        """
        argv = list(args)
        if "--ray" in argv:
            value_index = argv.index("--ray") + 1
            if value_index == len(argv) or argv[value_index].startswith("-"):
                argv.insert(value_index, "local")
        return super().parse_args(ctx, argv)


def check_output_file(path: Path, suffix: str) -> None:
    """Check that a file can be written; nothing is created.

    Args:
        path: The file.
        suffix: The suffix that its name must have, e.g. ``.safetensors``.

    Raises:
        InvalidArgumentError: The suffix differs, the path is a folder, or its folder cannot be
            written.
    """
    if path.suffix != suffix:
        raise InvalidArgumentError(
            f"{str(path)!r} cannot be written: a name that ends in {suffix} is expected"
        )
    if path.is_dir():
        raise InvalidArgumentError(
            f"{str(path)!r} is a folder, a file was expected: name a file in it"
        )
    check_output_dir(path.parent)


def check_output_dir(path: Path) -> None:
    """Check that files can be written into a folder, which may be missing; nothing is created.

    Args:
        path: The folder.

    Raises:
        InvalidArgumentError: The path is a file, or the nearest existing folder cannot be written.
    """
    existing_parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not existing_parent.is_dir():
        raise InvalidArgumentError(
            f"cannot write into {str(path)!r}: {str(existing_parent)!r} is a file, "
            "a folder was expected"
        )
    if not os.access(existing_parent, os.W_OK | os.X_OK):
        raise InvalidArgumentError(
            f"cannot write into {str(path)!r}: no permission in {str(existing_parent)!r}, "
            "choose another folder"
        )


def load_model_and_reranker(
    model: str | None,
    method: str | None,
    base: "DiffusionBase | None",
    config: "GenerationConfig",
    judge: str | None,
    compute: "ComputeConfig",
    released_options: "ReleasedOptions | None" = None,
) -> "tuple[AnyPhotoModel, IdentityReranker | None]":
    """Load a model from photos, and what ranks its samples.

    Args:
        model: The folder or the hub id; None for the bundled model of ``method``.
        method: The expected method; None accepts any.
        base: The base, which the model must suit; None if it does not run.
        config: The settings, which the model must suit.
        judge: What ranks: folder of an attribute classifier, or an insightface pack; None for
            the bundled classifier.
        compute: The device of the model and of what ranks.
        released_options: Where the parts of a network that others released come from.

    Returns:
        The model, and the reranker; None if there is no base, or nothing to rank.

    Raises:
        InvalidArgumentError: The method is unknown, or the settings do not suit the model.
        LayoutMismatchError: The model is for another base.
        ModelLoadError: The model or the judge cannot be loaded.
    """
    from hyperlora.pipelines.auto import load_photo_model
    from hyperlora.pipelines.generate import validate_config
    from hyperlora.pipelines.rerank import IdentityReranker, make_scoring_prompts

    image_to_lora = load_photo_model(model, method, base, compute, released_options)
    if base is not None:
        image_to_lora.check_base(base)
    validate_config(image_to_lora, config)
    if base is None or not config.needs_reranking:
        return image_to_lora, None
    reranker = IdentityReranker(
        base,
        _load_judge(judge, base, compute),
        make_scoring_prompts(image_to_lora.trigger_phrase),
    )
    return image_to_lora, reranker


def _load_judge(judge: str | None, base: "DiffusionBase", compute: "ComputeConfig") -> "ImageJudge":
    """Load an attribute classifier, or else a face pack: a folder without ``config.json``."""
    from hyperlora import pretrained
    from hyperlora.encoders.identity_similarity import IdentitySimilarity
    from hyperlora.pipelines.face_similarity import FaceSimilarity

    if judge is not None and not (Path(judge) / "config.json").is_file():
        return FaceSimilarity.from_pack(judge, base.resolution)
    identity_similarity = IdentitySimilarity.from_pretrained(judge or pretrained.EVALUATOR_DIR)
    return identity_similarity.to(compute.torch_device)


def print_facts(model: "AnyPhotoModel") -> None:
    """Print licenses, trigger phrase and strength of a network that others released, on stderr.

    Args:
        model: Any model from photos; for hyperlora's own nothing is printed.
    """
    from hyperlora.pipelines.released.released_model import ReleasedModel

    if not isinstance(model, ReleasedModel):
        return
    for note in model.facts.list_notes():
        typer.echo(f"note: {note}", err=True)


def warn_of_lost_readers(layout: "LoraLayout", format: "FormatChoice", architecture: str) -> None:
    """Print a line on stderr if programs cannot read a file that another format would serve.

    Args:
        layout: The layout of the LoRA in the file.
        format: What the user asked for.
        architecture: modelspec's name of the base; empty for unknown.
    """
    from hyperlora.lora.io.formats import describe_lost_readers, resolve_format

    file_format = resolve_format(format, layout, architecture)
    if sentence := describe_lost_readers(layout, file_format, architecture):
        typer.echo(f"note: {sentence}", err=True)


def save_image(image: "Image.Image", path: Path) -> None:
    """Write a PNG file, whole or not at all, and its folder if it is missing.

    Args:
        image: The image.
        path: The file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temp_path = path.with_name(f".{path.name}.part")
    image.save(temp_path, "PNG")
    temp_path.replace(path)


def parse_weighted_path(text: str) -> tuple[Path, float | None]:
    """Parse ``FILE`` or ``FILE:WEIGHT``.

    Args:
        text: The argument; a file of the whole name counts as one without a weight.

    Returns:
        The path as it stands on disk, and the weight, None if there is none.

    Raises:
        InvalidArgumentError: The weight is not between -10 and 10.
    """
    path, _, weight = text.rpartition(":")
    whole_path = find_path(Path(text))
    if not path or whole_path.exists():
        return whole_path, None
    try:
        weight_value = float(weight)
    except ValueError:
        return whole_path, None
    if not abs(weight_value) <= MAX_LORA_WEIGHT:  # also refuses NaN
        raise InvalidArgumentError(
            f"LoRA weight between -10 and 10 expected, got {weight!r} in {text!r}"
        )
    return find_path(Path(path)), weight_value
