"""LoRA file tools: ``hyperlora convert``, ``combine``, ``diff``, ``resize``, ``scale``, ``split``.

Every command prints the relative error of the written file against the exact result,
‖ΔW - ΔŴ‖ / ‖ΔW‖.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, cast

import typer

from hyperlora.cli.options import (
    FORMAT_HELP,
    check_output_dir,
    check_output_file,
    parse_weighted_path,
    replace_unprintable,
    warn_of_lost_readers,
)
from hyperlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from hyperlora.lora.io.formats import FormatChoice
    from hyperlora.lora.io.load import LoraFile
    from hyperlora.lora.io.metadata import LoraMetadata
    from hyperlora.lora.weights import LoraWeights

_Output = Annotated[Path, typer.Option("-o", "--output", help="LoRA file to write.")]
_Format = Annotated[
    str | None,
    typer.Option(help=f"{FORMAT_HELP[:-1]}; the input's by default."),
]
_Dtype = Annotated[
    str | None,
    typer.Option(help="float32, float16 or bfloat16; the input's by default."),
]
_Rank = Annotated[
    int | None, typer.Option(min=1, help="Rank of the result, by SVD; exact by default.")
]
BLORA_BLOCKS: Final = (
    "content=unet.up_blocks.0.attentions.0",
    "style=unet.up_blocks.0.attentions.1",
)
"""The two blocks of SDXL that B-LoRA trains (2403.14572)."""
_FILE_NAME_CHARS: Final = frozenset(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"
)
_DTYPES: Final = ("float32", "float16", "bfloat16")


def convert(
    file: Annotated[Path, typer.Argument(help="LoRA file.")],
    output: _Output,
    format: Annotated[str, typer.Option(help=FORMAT_HELP)] = "auto",
    dtype: _Dtype = None,
) -> None:
    """Convert a LoRA file to the key names of other tools."""
    lora_file = _load_lora_file(file)
    weights = lora_file.weights
    dtype = _choose_dtype(dtype, [lora_file])
    _save_lora_with_error(weights, weights, output, lora_file.metadata, format, dtype)


def combine(
    files: Annotated[list[str], typer.Argument(help="FILE or FILE:WEIGHT, two or more.")],
    output: _Output,
    method: Annotated[
        str, typer.Option(help="concat, svd, linear, ties, dare, dare_ties or magnitude.")
    ] = "concat",
    rank: _Rank = None,
    density: Annotated[
        float, typer.Option(help="Fraction of values that ties, dare and magnitude keep.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of the values that dare drops.")] = 0,
    format: _Format = None,
    dtype: _Dtype = None,
) -> None:
    """Merge LoRA files: the exact weighted sum (ranks add up), or one of lower rank."""
    from hyperlora.lora.io.combined import merge_metadata
    from hyperlora.lora.merge import merge

    weighted_paths = [
        (path, 1.0 if weight is None else weight)
        for path, weight in map(parse_weighted_path, files)
    ]
    lora_files = _load_compatible_files([path for path, _ in weighted_paths])
    loras = [lora_file.weights for lora_file in lora_files]
    weights = [weight for _, weight in weighted_paths]
    exact = merge(loras, weights)
    merged = merge(loras, weights, method, rank, density, seed)
    names = [
        f"{weight:g} {lora_file.metadata.title or path.stem}"
        for (path, weight), lora_file in zip(weighted_paths, lora_files, strict=True)
    ]
    metadata = merge_metadata(lora_files, " + ".join(names), weights)
    dtype = _choose_dtype(dtype, lora_files)
    _save_lora_with_error(merged, exact, output, metadata, format or lora_files[0].format, dtype)


def diff(
    after: Annotated[Path, typer.Argument(help="LoRA file.")],
    before: Annotated[Path, typer.Argument(help="LoRA file to subtract.")],
    output: _Output,
    rank: _Rank = None,
    format: _Format = None,
    dtype: _Dtype = None,
) -> None:
    """Subtract LoRA files: AFTER - BEFORE."""
    from hyperlora.lora.io.combined import merge_metadata
    from hyperlora.lora.merge import merge

    lora_files = _load_compatible_files([after, before])
    weights = [1.0, -1.0]
    exact = merge([lora_file.weights for lora_file in lora_files], weights)
    difference = exact if rank is None else exact.resize(rank)
    names = [
        lora_file.metadata.title or path.stem
        for path, lora_file in zip((after, before), lora_files, strict=True)
    ]
    metadata = merge_metadata(lora_files, " - ".join(names), weights)
    dtype = _choose_dtype(dtype, lora_files)
    _save_lora_with_error(
        difference, exact, output, metadata, format or lora_files[0].format, dtype
    )


def resize(
    file: Annotated[Path, typer.Argument(help="LoRA file.")],
    output: _Output,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the result.")],
    format: _Format = None,
    dtype: _Dtype = None,
) -> None:
    """Change the rank of a LoRA file, with the least error (SVD)."""
    from hyperlora.lora.io.combined import renew_metadata

    lora_file = _load_lora_file(file)
    resized = lora_file.weights.resize(rank)
    metadata = renew_metadata(lora_file.metadata, f"rank {rank}")
    dtype = _choose_dtype(dtype, [lora_file])
    _save_lora_with_error(
        resized, lora_file.weights, output, metadata, format or lora_file.format, dtype
    )


def scale(
    file: Annotated[Path, typer.Argument(help="LoRA file.")],
    output: _Output,
    factor: Annotated[
        float | None, typer.Option(help="Factor of the whole LoRA; -1 negates it.")
    ] = None,
    block: Annotated[
        list[str] | None, typer.Option(help="BLOCK=FACTOR, e.g. unet.mid_block=0; repeat.")
    ] = None,
    format: _Format = None,
    dtype: _Dtype = None,
) -> None:
    """Scale a LoRA file, or some of its blocks."""
    from hyperlora.lora.blocks import scale_blocks
    from hyperlora.lora.io.combined import renew_metadata
    from hyperlora.lora.merge import validate_weights

    if factor is None and not block:
        raise InvalidArgumentError("by how much? Give --factor FACTOR or --block BLOCK=FACTOR")
    block_factors = {
        name: _parse_factor(name, value) for name, value in map(_parse_name_value, block or [])
    }
    lora_file = _load_lora_file(file)
    (global_factor,) = validate_weights([1.0 if factor is None else factor], 1)
    scaled = scale_blocks(lora_file.weights, block_factors) * global_factor
    factors = {"": global_factor, **block_factors} if factor is not None else block_factors
    title_suffix = ", ".join(f"{name} x{value:g}".strip() for name, value in factors.items())
    metadata = renew_metadata(lora_file.metadata, title_suffix)
    metadata = replace(metadata, recommended_strength=1.0)  # the factor is what the user wants
    dtype = _choose_dtype(dtype, [lora_file])
    _save_lora_with_error(scaled, scaled, output, metadata, format or lora_file.format, dtype)


def split(
    file: Annotated[Path, typer.Argument(help="LoRA file.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder to write, one file per part.")
    ],
    part: Annotated[
        list[str] | None,
        typer.Option(help="NAME=BLOCK[,BLOCK...]; repeat. B-LoRA's blocks of SDXL by default."),
    ] = None,
    format: _Format = None,
    dtype: _Dtype = None,
) -> None:
    """Split a LoRA file by blocks, e.g. into content and style."""
    from hyperlora.lora.blocks import select_blocks

    blocks_by_part = dict(map(_parse_name_value, part or BLORA_BLOCKS))
    check_output_dir(output)
    if invalid_names := [
        name for name in blocks_by_part if not name or not set(name) <= _FILE_NAME_CHARS
    ]:
        raise InvalidArgumentError(
            f"part {invalid_names[0]!r} cannot name a file: letters, digits, - and _ expected"
        )
    lora_file = _load_lora_file(file)
    # all parts exist before the first is written
    loras_by_part = {
        name: select_blocks(lora_file.weights, blocks.split(","))
        for name, blocks in blocks_by_part.items()
    }
    dtype = _choose_dtype(dtype, [lora_file])
    for name, weights in loras_by_part.items():
        title = f"{lora_file.metadata.title or file.stem} ({name})"
        metadata = replace(lora_file.metadata, title=title)
        path = output / f"{name}.safetensors"
        _save_lora_with_error(weights, weights, path, metadata, format or lora_file.format, dtype)


def _load_lora_file(path: Path) -> "LoraFile":
    from hyperlora.lora.io.load import load_lora

    lora_file = load_lora(path)
    for note in lora_file.notes:
        typer.echo(f"note: {replace_unprintable(path.name)}: {note}", err=True)
    return lora_file


def _load_compatible_files(paths: Sequence[Path]) -> "list[LoraFile]":
    """Load LoRA files of one architecture."""
    from hyperlora.lora.io.combined import check_files_compatible

    lora_files = [_load_lora_file(path) for path in paths]
    check_files_compatible([path.name for path in paths], lora_files)
    return lora_files


def _choose_dtype(dtype: str | None, lora_files: "Sequence[LoraFile]") -> str:
    """The dtype of the user, else that of the files."""
    from hyperlora.lora.io.combined import choose_dtype

    if dtype is None:
        return str(choose_dtype(lora_files)).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise InvalidArgumentError(f"unknown dtype {dtype!r}; known: {', '.join(_DTYPES)}")
    return dtype


def _save_lora_with_error(
    weights: "LoraWeights",
    reference: "LoraWeights",
    output_path: Path,
    metadata: "LoraMetadata",
    format: str,
    dtype: str,
) -> None:
    """Write a LoRA and print its relative error against ``reference``.

    The file is read in memory as the next command will read it, and written only then.
    """
    import torch

    from hyperlora.lora.io.formats import resolve_format
    from hyperlora.lora.io.load import load_lora
    from hyperlora.lora.io.safetensors_file import write_bytes
    from hyperlora.lora.io.save import serialize_lora
    from hyperlora.lora.merge import compute_relative_error

    check_output_file(output_path, ".safetensors")
    architecture = metadata.architecture
    file_format = resolve_format(cast("FormatChoice", format), weights.layout, architecture)
    torch_dtype = getattr(torch, dtype)
    file_metadata = replace(metadata, date="", output_name=output_path.stem)
    data = serialize_lora(weights, format=file_format, metadata=file_metadata, dtype=torch_dtype)
    load_lora(data)  # without its base, which serialize_lora knows
    rounded_weights = weights.apply(lambda tensor: tensor.to(torch_dtype).float())
    error = compute_relative_error(rounded_weights, reference)
    write_bytes(data, output_path)
    typer.echo(
        f"{output_path}: rank {weights.layout.rank}, {len(weights.layout.targets)} targets, "
        f"{file_format}, {dtype}, error {error:.2g}"
    )
    warn_of_lost_readers(weights.layout, file_format, architecture)


def _parse_name_value(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InvalidArgumentError(f"NAME=VALUE expected, got {text!r}")
    return name, value


def _parse_factor(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise InvalidArgumentError(
            f"the factor of block {name!r} must be a number, got {value!r}"
        ) from None
