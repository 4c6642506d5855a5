"""Commands that draw the avatar world: portraits, pairs, tokenizer and benchmarks."""

from typing import Annotated

import typer

from data_builder.cli.options import OutputDir, Split


def draw_portraits(
    output: OutputDir,
    split: Split = "train",
    num_subjects: Annotated[int, typer.Option(min=1, help="Number of identities.")] = 6000,
    portraits_per_identity: Annotated[
        int, typer.Option(min=1, help="Portraits of each identity.")
    ] = 4,
    resolution: Annotated[int, typer.Option(min=16, help="Side of the images in pixels.")] = 128,
) -> None:
    """Draw portraits of avatars."""
    from data_builder.avatars.portrait_dataset import PortraitDatasetConfig, draw_portraits

    config = PortraitDatasetConfig(split, num_subjects, portraits_per_identity, resolution)
    draw_portraits(output, config)


def draw_pairs(
    output: OutputDir,
    split: Split = "train",
    num_edits: Annotated[int, typer.Option(min=1, help="Number of edits.")] = 8000,
    subjects_per_edit: Annotated[
        int, typer.Option(min=1, help="Identities that each edit is applied to.")
    ] = 2,
    resolution: Annotated[int, typer.Option(min=16, help="Side of the images in pixels.")] = 128,
    two_edit_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of edits that change two attributes.")
    ] = 0.2,
) -> None:
    """Draw before/after pairs of avatars, each edit on several identities."""
    from data_builder.avatars.pair_dataset import PairDatasetConfig, draw_pairs

    config = PairDatasetConfig(split, num_edits, subjects_per_edit, resolution, two_edit_fraction)
    draw_pairs(output, config)


def build_tokenizer(output: OutputDir) -> None:
    """Build the CLIP tokenizer of the avatar world."""
    from data_builder.avatars.tokenizer import build_tokenizer

    typer.echo(f"{len(build_tokenizer(output))} tokens in {output}")


def write_benchmark(
    output: OutputDir,
    split: Split = "test",
    num_subjects: Annotated[int, typer.Option(min=2, help="Number of identities.")] = 64,
    portraits_per_identity: Annotated[
        int, typer.Option(min=2, help="Photos of each identity.")
    ] = 8,
) -> None:
    """Write the benchmark of `hyperlora evaluate`: photos of unseen identities and prompts."""
    from data_builder.avatars.benchmarks import write_benchmark

    write_benchmark(output, split, num_subjects, portraits_per_identity)


def write_edit_benchmark(
    output: OutputDir,
    split: Split = "test",
    edits_per_kind: Annotated[int, typer.Option(min=1, help="Edits of each kind.")] = 3,
    images_per_edit: Annotated[
        int, typer.Option(min=1, help="Images that each edit is evaluated on.")
    ] = 3,
) -> None:
    """Write the benchmark of `hyperlora evaluate --task edit`: edits of unseen identities."""
    from data_builder.avatars.benchmarks import write_edit_benchmark

    write_edit_benchmark(output, split, edits_per_kind, images_per_edit)
