"""LoRA file tools: ``hyperlora convert``, ``combine``, ``diff``, ``resize``, ``scale``, ``split``.

Every command prints the relative error of the written file against the exact result,
‖ΔW - ΔŴ‖ / ‖ΔW‖.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, cast

import typer

from hyperlora.cli.options import check_output_dir, check_output_file, parse_weighted_path
from hyperlora.errors import InvalidArgumentError

if TYPE_CHECKING:
    from hyperlora.lora.io.keys import LoraFormat
    from hyperlora.lora.io.load import LoraFile
    from hyperlora.lora.io.metadata import LoraMetadata
    from hyperlora.lora.weights import LoraWeights

_Output = Annotated[Path, typer.Option("-o", "--output", help="LoRA file to write.")]
_Format = Annotated[
    str | None,
    typer.Option(help="Key names: diffusers, kohya or sgm (SDXL); the input's by default."),
]
_Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]
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
    format: Annotated[
        str, typer.Option(help="Key names: diffusers, kohya or sgm (SDXL).")
    ] = "diffusers",
    dtype: _Dtype = "float32",
) -> None:
    """Convert a LoRA file to the key names of other tools."""
    lora_file = _load_lora_file(file)
    weights = lora_file.weights
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
    dtype: _Dtype = "float32",
) -> None:
    """Merge LoRA files: the exact weighted sum (ranks add up), or one of lower rank."""
    from hyperlora.lora.merge import merge

    weighted_paths = [parse_weighted_path(text) for text in files]
    lora_files = [_load_lora_file(path) for path, _ in weighted_paths]
    loras = [lora_file.weights for lora_file in lora_files]
    weights = [weight for _, weight in weighted_paths]
    exact = merge(loras, weights)
    merged = merge(loras, weights, method, rank, density, seed)
    names = [
        f"{weight:g} {lora_file.metadata.title or path.stem}"
        for (path, weight), lora_file in zip(weighted_paths, lora_files, strict=True)
    ]
    metadata = _merge_metadata(lora_files, " + ".join(names))
    _save_lora_with_error(merged, exact, output, metadata, format or lora_files[0].format, dtype)


def diff(
    after: Annotated[Path, typer.Argument(help="LoRA file.")],
    before: Annotated[Path, typer.Argument(help="LoRA file to subtract.")],
    output: _Output,
    rank: _Rank = None,
    format: _Format = None,
    dtype: _Dtype = "float32",
) -> None:
    """Subtract LoRA files: AFTER - BEFORE."""
    from hyperlora.lora.merge import merge

    lora_files = [_load_lora_file(after), _load_lora_file(before)]
    exact = merge([lora_file.weights for lora_file in lora_files], [1.0, -1.0])
    difference = exact if rank is None else exact.resize(rank)
    names = [
        lora_file.metadata.title or path.stem
        for path, lora_file in zip((after, before), lora_files, strict=True)
    ]
    metadata = _merge_metadata(lora_files, " - ".join(names))
    _save_lora_with_error(
        difference, exact, output, metadata, format or lora_files[0].format, dtype
    )


def resize(
    file: Annotated[Path, typer.Argument(help="LoRA file.")],
    output: _Output,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the result.")],
    format: _Format = None,
    dtype: _Dtype = "float32",
) -> None:
    """Change the rank of a LoRA file, with the least error (SVD)."""
    lora_file = _load_lora_file(file)
    resized, metadata = lora_file.weights.resize(rank), lora_file.metadata
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
    dtype: _Dtype = "float32",
) -> None:
    """Scale a LoRA file, or some of its blocks."""
    from hyperlora.lora.blocks import scale_blocks
    from hyperlora.lora.merge import validate_weights

    if factor is None and not block:
        raise InvalidArgumentError("by how much? Give --factor FACTOR or --block BLOCK=FACTOR")
    block_factors = {
        name: _parse_factor(name, value) for name, value in map(_parse_name_value, block or [])
    }
    lora_file = _load_lora_file(file)
    (global_factor,) = validate_weights([1.0 if factor is None else factor], 1)
    scaled = scale_blocks(lora_file.weights, block_factors) * global_factor
    _save_lora_with_error(
        scaled, scaled, output, lora_file.metadata, format or lora_file.format, dtype
    )


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
    dtype: _Dtype = "float32",
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
    for name, weights in loras_by_part.items():
        title = f"{lora_file.metadata.title or file.stem} ({name})"
        metadata = replace(lora_file.metadata, title=title)
        path = output / f"{name}.safetensors"
        _save_lora_with_error(weights, weights, path, metadata, format or lora_file.format, dtype)


def _load_lora_file(path: Path) -> "LoraFile":
    from hyperlora.lora.io.load import load_lora

    return load_lora(path)


def _save_lora_with_error(
    weights: "LoraWeights",
    reference: "LoraWeights",
    output_path: Path,
    metadata: "LoraMetadata",
    format: str,
    dtype: str,
) -> None:
    """Write a LoRA, read it back and print its relative error against ``reference``."""
    import torch

    from hyperlora.lora.io.load import load_lora
    from hyperlora.lora.io.save import save_lora
    from hyperlora.lora.merge import compute_relative_error

    check_output_file(output_path, ".safetensors")
    if dtype not in _DTYPES:
        raise InvalidArgumentError(f"unknown dtype {dtype!r}; known: {', '.join(_DTYPES)}")
    save_lora(
        weights,
        output_path,
        format=cast("LoraFormat", format),
        metadata=replace(metadata, date=""),
        dtype=getattr(torch, dtype),
    )
    error = compute_relative_error(load_lora(output_path).weights, reference)
    typer.echo(
        f"{output_path}: rank {weights.layout.rank}, {len(weights.layout.targets)} targets, "
        f"{format}, error {error:.2g}"
    )


def _merge_metadata(lora_files: "Sequence[LoraFile]", title: str) -> "LoraMetadata":
    """Merge metadata: what the files share, and every trigger phrase, license and photo."""
    all_metadata = [lora_file.metadata for lora_file in lora_files]
    return replace(
        all_metadata[0],
        title=title,
        trigger_phrase=_join_unique(metadata.trigger_phrase for metadata in all_metadata),
        license=_join_unique(metadata.license for metadata in all_metadata),
        encoder=_join_unique(metadata.encoder for metadata in all_metadata),
        encoder_license=_join_unique(metadata.encoder_license for metadata in all_metadata),
        reference_sha256=tuple(
            dict.fromkeys(
                sha256 for metadata in all_metadata for sha256 in metadata.reference_sha256
            )
        ),
        recommended_strength=1.0,
        extra={},
    )


def _join_unique(texts: Iterable[str]) -> str:
    """Join texts that are not empty, each once, in their order."""
    return ", ".join(dict.fromkeys(filter(None, texts)))


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
