"""``data-builder`` (or ``python -m data_builder``): build the datasets that training reads."""

from pathlib import Path
from typing import Annotated

import typer

from data_builder.cli import build
from hyperlora import pretrained
from hyperlora.cli import Verbs
from hyperlora.cli.options import RayCommand

app = typer.Typer(cls=Verbs, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for verb in (
    build.plan,
    build.run,
    build.status,
    build.audit,
    build.pack,
    build.collect,
    build.sample,
    build.components,
):
    app.command(cls=RayCommand if verb is build.run else None)(verb)


@app.callback()
def main() -> None:
    """Build the datasets that training reads."""


@app.command()
def avatars(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    people: Annotated[int, typer.Option(min=1, help="How many people.")] = 6000,
    each: Annotated[int, typer.Option(min=1, help="Portraits of each person.")] = 4,
    size: Annotated[int, typer.Option(min=16, help="Pixels.")] = 128,
) -> None:
    """Draw portraits of avatars: PEOPLE persons, EACH portraits of every one."""
    from data_builder.avatars.portrait_dataset import Plan, draw_portraits

    draw_portraits(out, Plan(split=split, people=people, each=each, size=size))


@app.command()
def edits(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    groups: Annotated[int, typer.Option(min=1, help="How many changes.")] = 8000,
    people: Annotated[int, typer.Option(min=1, help="People that each is made on.")] = 2,
    size: Annotated[int, typer.Option(min=16, help="Pixels.")] = 128,
    two: Annotated[float, typer.Option(min=0, max=1, help="Share of changes that are two at once.")] = 0.2,
) -> None:
    """Draw before/after pairs of avatars: the same change on PEOPLE persons, GROUPS times."""
    from data_builder.avatars.pair_dataset import PairPlan, draw_pairs

    draw_pairs(out, PairPlan(split=split, groups=groups, people=people, size=size, two=two))


@app.command()
def edit_benchmark(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    each: Annotated[int, typer.Option(min=1, help="Edits of every kind.")] = 3,
    others: Annotated[int, typer.Option(min=1, help="Pictures that each edit is asked for on.")] = 3,
) -> None:
    """Write the benchmark that `hyperlora evaluate --task edit` reads: edits shown and asked for on unseen people."""
    from data_builder.avatars.benchmarks import write_edit_benchmark

    write_edit_benchmark(out, split, each, others)


@app.command()
def tokenizer(out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")]) -> None:
    """Build the avatar world's CLIP tokenizer."""
    from data_builder.avatars.tokenizer import build_tokenizer

    typer.echo(f"{len(build_tokenizer(out))} tokens in {out}")


@app.command()
def benchmark(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    people: Annotated[int, typer.Option(min=2)] = 64,
    photos: Annotated[int, typer.Option(min=2, help="Photos of each person.")] = 8,
) -> None:
    """Write the avatar benchmark that `hyperlora evaluate` reads: photos of unseen people, prompts with truth."""
    from data_builder.avatars.benchmarks import write_benchmark

    write_benchmark(out, split, people, photos)


@app.command()
def domain(
    portraits: Annotated[Path, typer.Argument(help="Drawn training portraits (`avatars`).")],
    held_out: Annotated[Path, typer.Argument(help="Drawn validation portraits.")],
    model: Annotated[Path, typer.Option(help="Folder of a model from photos to write into.")] = pretrained.MODEL,
    subjects: Annotated[str, typer.Option(help="What people call these pictures.")] = "avatars",
) -> None:
    """Measure what a model's training portraits look like, so that it can tell other photos from them."""
    from data_builder.release.calibration import write_domain

    typer.echo(f"{model}: photos farther than {write_domain(model, portraits, held_out, subjects):.1f} are unknown")


@app.command()
def identity(
    reader: Annotated[Path, typer.Argument(help="Folder of the reader that the model's photo encoder comes from.")],
    model: Annotated[Path, typer.Option(help="Folder of a model from photos to write into.")] = pretrained.MODEL,
) -> None:
    """Put a reader's identity space beside a model from photos, which then refines LoRAs by it."""
    from data_builder.release.calibration import write_identity

    typer.echo(f"{model}: identities of {write_identity(model, reader)} numbers")


@app.command()
def likeness(
    portraits: Annotated[Path, typer.Argument(help="Drawn validation portraits, several of each person.")],
    evaluator: Annotated[Path, typer.Option(help="Folder of a reader to write into.")] = pretrained.EVALUATOR,
) -> None:
    """Measure an evaluator's identity scale: its cosines between portraits of different people, and of the same."""
    from data_builder.release.calibration import write_identity_scale

    different, same = write_identity_scale(evaluator, portraits)
    typer.echo(f"{evaluator}: {different:.3f} between people, {same:.3f} between portraits of one person")


@app.command()
def face_pack(
    detector: Annotated[Path, typer.Argument(help="Folder of a trained FaceDetector.")],
    recogniser: Annotated[Path, typer.Argument(help="Folder of a trained FaceRecogniser.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the pack to write.")] = pretrained.FACE_PACK,
) -> None:
    """Write a face pack that insightface loads: a detector and a recogniser as ONNX, their SHA-256 pinned."""
    from data_builder.release.face_pack import write_face_pack

    typer.echo(f"{out}: {write_face_pack(detector, recogniser, out) / 1e6:.2f} MB")


@app.command()
def shrink(
    model: Annotated[Path, typer.Argument(help="Folder of a released network with a learned basis.")],
    pictures: Annotated[Path, typer.Argument(help="Drawn training portraits (`avatars`) or pairs (`edits`).")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    size: Annotated[int, typer.Option(min=1, help="Directions to keep.")] = 20,
) -> None:
    """Leave out basis directions that a network hardly uses, for a smaller file."""
    from data_builder.release.prune_basis import shrink

    typer.echo(f"{out}: {shrink(model, pictures, out, size):.4f} of the LoRAs' norm is lost")


@app.command()
def borrow(
    model: Annotated[Path, typer.Argument(help="Folder of a released model.")],
    lender: Annotated[str, typer.Argument(help="Model in the folder beside it.")],
    part: Annotated[str, typer.Option(help="What both hold.")] = "encoder",
) -> None:
    """Leave out of a model what another one beside it holds too, for a smaller file."""
    from data_builder.release.share_weights import borrow

    typer.echo(f"{model}: {borrow(model, part, lender) / 1e6:.1f} MB borrowed from {lender}")


@app.command()
def fitted(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    people: Annotated[int, typer.Option(min=1)] = 6,
    steps: Annotated[int, typer.Option(min=1)] = 300,
    lr: Annotated[float, typer.Option()] = 1e-3,
) -> None:
    """Fit a LoRA to one photo of each of the bundle's test people, as a baseline for the demo."""
    from data_builder.baselines.fitted_loras import fit_benchmark
    from hyperlora.cpu import keep_heap
    from hyperlora.evaluation.subject_suite import FitSettings

    keep_heap()
    fit_benchmark(out, people, FitSettings(steps=steps, lr=lr))


@app.command()
def differential(
    before: Annotated[Path, typer.Argument(help="Image, or folder of images.")],
    after: Annotated[Path, typer.Argument(help="Image, or folder of as many images under the same names.")],
    base: Annotated[str, typer.Option(help="Base model: folder or hub id.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write (.safetensors).")],
    sheet: Annotated[Path | None, typer.Option(help="Also draw -2 ... +2 of the change to this PNG.")] = None,
    prompt: Annotated[str, typer.Option(help="What the sheet shows.")] = "a portrait of a person",
    preset: Annotated[str, typer.Option()] = "attention+mlp",
    rank: Annotated[int, typer.Option(min=1)] = 4,
    steps: Annotated[int, typer.Option(min=1)] = 300,
    lr: Annotated[float, typer.Option()] = 2e-3,
    format: Annotated[str, typer.Option(help="diffusers, kohya or sgm (SDXL).")] = "diffusers",
) -> None:
    """Fit a LoRA to each image of a before/after pair (or of many) and keep the difference: a slider."""
    from data_builder.baselines.differential_lora import build

    build(
        before, after, base, out, sheet=sheet, prompt=prompt, preset=preset, rank=rank, steps=steps, lr=lr,
        format=format
    )  # fmt: skip


@app.command()
def codes(
    portraits: Annotated[Path, typer.Argument(help="Drawn portraits (`avatars`).")],
    base: Annotated[str, typer.Option(help="Base model folder.")],
    vae: Annotated[str, typer.Option(help="Autoencoder that made the latents.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write (.safetensors).")],
    people: Annotated[int, typer.Option(min=1)] = 256,
    at_once: Annotated[int, typer.Option(min=1, help="People fitted together.")] = 32,
    steps: Annotated[int, typer.Option(min=1)] = 150,
    lr: Annotated[float, typer.Option()] = 1e-2,
    preset: Annotated[str, typer.Option()] = "attention+mlp",
    rank: Annotated[int, typer.Option(min=1)] = 1,
    a: Annotated[int, typer.Option(min=1)] = 100,
    b: Annotated[int, typer.Option(min=1)] = 50,
) -> None:
    """Fit LiDB codes to drawn people: what the faithful hypernetwork regresses to."""
    from data_builder.baselines.lidb_targets import fit_codes
    from hyperlora.cpu import keep_heap

    keep_heap()
    fit_codes(
        portraits,
        base,
        vae,
        out,
        people=people,
        at_once=at_once,
        steps=steps,
        lr=lr,
        preset=preset,
        rank=rank,
        a=a,
        b=b,
    )


if __name__ == "__main__":
    app()
