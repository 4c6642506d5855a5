"""``data-builder`` (or ``python -m data_builder``): build the datasets that training reads."""

from pathlib import Path
from typing import Annotated

import typer

from data_builder.cli import build
from hyperlora import pretrained
from hyperlora.cli import CommandGroup
from hyperlora.cli.options import RayCommand

app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
for command in (
    build.plan,
    build.run,
    build.show_status,
    build.audit,
    build.pack,
    build.import_loras,
    build.export_sample,
    build.fit_pca,
):
    app.command(cls=RayCommand if command is build.run else None)(command)


@app.callback()
def main_callback() -> None:
    """Build the datasets that training reads."""


@app.command()
def draw_portraits(
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    num_subjects: Annotated[int, typer.Option(min=1, help="How many people.")] = 6000,
    portraits_per_identity: Annotated[
        int, typer.Option(min=1, help="Portraits of each person.")
    ] = 4,
    resolution: Annotated[int, typer.Option(min=16, help="Pixels.")] = 128,
) -> None:
    """Draw portraits of avatars: PEOPLE persons, EACH portraits of every one."""
    from data_builder.avatars.portrait_dataset import PortraitDatasetConfig, draw_portraits

    draw_portraits(
        output,
        PortraitDatasetConfig(
            split=split,
            num_identities=num_subjects,
            portraits_per_identity=portraits_per_identity,
            size=resolution,
        ),
    )


@app.command()
def draw_pairs(
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    num_edits: Annotated[int, typer.Option(min=1, help="How many changes.")] = 8000,
    subjects_per_edit: Annotated[int, typer.Option(min=1, help="People that each is made on.")] = 2,
    resolution: Annotated[int, typer.Option(min=16, help="Pixels.")] = 128,
    two_edit_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of changes that are two at once.")
    ] = 0.2,
) -> None:
    """Draw before/after pairs of avatars: the same change on PEOPLE persons, GROUPS times."""
    from data_builder.avatars.pair_dataset import PairDatasetConfig, draw_pairs

    draw_pairs(
        output,
        PairDatasetConfig(
            split=split,
            num_edits=num_edits,
            identities_per_edit=subjects_per_edit,
            size=resolution,
            two_edit_fraction=two_edit_fraction,
        ),
    )


@app.command()
def write_edit_benchmark(
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    edits_per_kind: Annotated[int, typer.Option(min=1, help="Edits of every kind.")] = 3,
    images_per_edit: Annotated[
        int, typer.Option(min=1, help="Pictures that each edit is asked for on.")
    ] = 3,
) -> None:
    """Write the benchmark that `hyperlora evaluate --task edit` reads: edits shown and asked for on unseen people."""
    from data_builder.avatars.benchmarks import write_edit_benchmark

    write_edit_benchmark(output, split, edits_per_kind, images_per_edit)


@app.command()
def build_tokenizer(
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
) -> None:
    """Build the avatar world's CLIP tokenizer."""
    from data_builder.avatars.tokenizer import build_tokenizer

    typer.echo(f"{len(build_tokenizer(output))} tokens in {output}")


@app.command()
def write_benchmark(
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    num_subjects: Annotated[int, typer.Option(min=2)] = 64,
    portraits_per_identity: Annotated[int, typer.Option(min=2, help="Photos of each person.")] = 8,
) -> None:
    """Write the avatar benchmark that `hyperlora evaluate` reads: photos of unseen people, prompts with truth."""
    from data_builder.avatars.benchmarks import write_benchmark

    write_benchmark(output, split, num_subjects, portraits_per_identity)


@app.command()
def fit_ood(
    train_portraits: Annotated[
        Path, typer.Argument(help="Drawn training portraits (`draw_portraits`).")
    ],
    val_portraits: Annotated[Path, typer.Argument(help="Drawn validation portraits.")],
    model: Annotated[
        Path, typer.Option(help="Folder of a model from photos to write into.")
    ] = pretrained.IMAGE_TO_LORA_DIR,
    domain_name: Annotated[str, typer.Option(help="What people call these pictures.")] = "avatars",
) -> None:
    """Measure what a model's training portraits look like, so that it can tell other photos from them."""
    from data_builder.release.calibration import fit_ood_detector

    typer.echo(
        f"{model}: photos farther than {fit_ood_detector(model, train_portraits, val_portraits, domain_name):.1f} are unknown"
    )


@app.command()
def export_identity(
    classifier: Annotated[
        Path, typer.Argument(help="Folder of the reader that the model's photo encoder comes from.")
    ],
    model: Annotated[
        Path, typer.Option(help="Folder of a model from photos to write into.")
    ] = pretrained.IMAGE_TO_LORA_DIR,
) -> None:
    """Put a reader's identity space beside a model from photos, which then refines LoRAs by it."""
    from data_builder.release.calibration import export_identity_embedder

    typer.echo(f"{model}: identities of {export_identity_embedder(model, classifier)} numbers")


@app.command()
def calibrate_identity(
    portraits: Annotated[
        Path, typer.Argument(help="Drawn validation portraits, several of each person.")
    ],
    evaluator: Annotated[
        Path, typer.Option(help="Folder of a reader to write into.")
    ] = pretrained.EVALUATOR_DIR,
) -> None:
    """Measure an evaluator's identity scale: its cosines between portraits of different people, and of the same."""
    from data_builder.release.calibration import calibrate_identity_scale

    different, same = calibrate_identity_scale(evaluator, portraits)
    typer.echo(
        f"{evaluator}: {different:.3f} between people, {same:.3f} between portraits of one person"
    )


@app.command()
def export_face_pack(
    detector: Annotated[Path, typer.Argument(help="Folder of a trained FaceDetector.")],
    recognizer: Annotated[Path, typer.Argument(help="Folder of a trained FaceRecogniser.")],
    output: Annotated[
        Path, typer.Option("-o", "--out", help="Folder of the pack to write.")
    ] = pretrained.FACE_PACK_DIR,
) -> None:
    """Write a face pack that insightface loads: a detector and a recogniser as ONNX, their SHA-256 pinned."""
    from data_builder.release.face_pack import write_face_pack

    typer.echo(f"{output}: {write_face_pack(detector, recognizer, output) / 1e6:.2f} MB")


@app.command()
def prune_basis(
    model: Annotated[
        Path, typer.Argument(help="Folder of a released network with a learned basis.")
    ],
    images: Annotated[
        Path,
        typer.Argument(help="Drawn training portraits (`draw_portraits`) or pairs (`draw_pairs`)."),
    ],
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    basis_size: Annotated[int, typer.Option(min=1, help="Directions to keep.")] = 20,
) -> None:
    """Leave out basis directions that a network hardly uses, for a smaller file."""
    from data_builder.release.prune_basis import prune_basis_model

    typer.echo(
        f"{output}: {prune_basis_model(model, images, output, basis_size):.4f} of the LoRAs' norm is lost"
    )


@app.command()
def share_weights(
    model: Annotated[Path, typer.Argument(help="Folder of a released model.")],
    source_model: Annotated[str, typer.Argument(help="Model in the folder beside it.")],
    component: Annotated[str, typer.Option(help="What both hold.")] = "encoder",
) -> None:
    """Leave out of a model what another one beside it holds too, for a smaller file."""
    from data_builder.release.share_weights import share_weights

    typer.echo(
        f"{model}: {share_weights(model, component, source_model) / 1e6:.1f} MB borrowed from {source_model}"
    )


@app.command()
def fit_baselines(
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    num_subjects: Annotated[int, typer.Option(min=1)] = 6,
    finetune_steps: Annotated[int, typer.Option(min=1)] = 300,
    lr: Annotated[float, typer.Option()] = 1e-3,
) -> None:
    """Fit a LoRA to one photo of each of the bundle's test people, as a baseline for the demo."""
    from data_builder.baselines.fitted_loras import fit_baseline_loras
    from hyperlora.cpu import disable_malloc_trim
    from hyperlora.evaluation.subject_suite import FineTuneBaseline

    disable_malloc_trim()
    fit_baseline_loras(output, num_subjects, FineTuneBaseline(num_steps=finetune_steps, lr=lr))


@app.command()
def fit_differential_lora(
    before: Annotated[Path, typer.Argument(help="Image, or folder of images.")],
    after: Annotated[
        Path, typer.Argument(help="Image, or folder of as many images under the same names.")
    ],
    base: Annotated[str, typer.Option(help="Base model: folder or hub id.")],
    output: Annotated[Path, typer.Option("-o", "--out", help="File to write (.safetensors).")],
    slider_grid: Annotated[
        Path | None, typer.Option(help="Also draw -2 ... +2 of the change to this PNG.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="What the sheet shows.")] = "a portrait of a person",
    preset: Annotated[str, typer.Option()] = "attention+mlp",
    rank: Annotated[int, typer.Option(min=1)] = 4,
    finetune_steps: Annotated[int, typer.Option(min=1)] = 300,
    lr: Annotated[float, typer.Option()] = 2e-3,
    format: Annotated[str, typer.Option(help="diffusers, kohya or sgm (SDXL).")] = "diffusers",
) -> None:
    """Fit a LoRA to each image of a before/after pair (or of many) and keep the difference: a slider."""
    from data_builder.baselines.differential_lora import build_differential_lora

    build_differential_lora(
        before,
        after,
        base,
        output,
        grid_path=slider_grid,
        prompt=prompt,
        preset=preset,
        rank=rank,
        finetune_steps=finetune_steps,
        lr=lr,
        format=format,
    )


@app.command()
def fit_lidb_targets(
    portraits: Annotated[Path, typer.Argument(help="Drawn portraits (`draw_portraits`).")],
    base: Annotated[str, typer.Option(help="Base model folder.")],
    vae: Annotated[str, typer.Option(help="Autoencoder that made the latents.")],
    output: Annotated[Path, typer.Option("-o", "--out", help="File to write (.safetensors).")],
    num_subjects: Annotated[int, typer.Option(min=1)] = 256,
    subjects_per_batch: Annotated[
        int, typer.Option(min=1, help="People fit_baselines together.")
    ] = 32,
    finetune_steps: Annotated[int, typer.Option(min=1)] = 150,
    lr: Annotated[float, typer.Option()] = 1e-2,
    preset: Annotated[str, typer.Option()] = "attention+mlp",
    rank: Annotated[int, typer.Option(min=1)] = 1,
    a: Annotated[int, typer.Option(min=1)] = 100,
    b: Annotated[int, typer.Option(min=1)] = 50,
) -> None:
    """Fit LiDB codes to drawn people: what the faithful hypernetwork regresses to."""
    from data_builder.baselines.lidb_targets import fit_lidb_targets
    from hyperlora.cpu import disable_malloc_trim

    disable_malloc_trim()
    fit_lidb_targets(
        portraits,
        base,
        vae,
        output,
        num_subjects=num_subjects,
        subjects_per_batch=subjects_per_batch,
        steps=finetune_steps,
        lr=lr,
        preset=preset,
        rank=rank,
        a=a,
        b=b,
    )


if __name__ == "__main__":
    app()
