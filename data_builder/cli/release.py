"""Commands that prepare models and datasets for release."""

from pathlib import Path
from typing import Annotated

import typer

from data_builder.cli.options import OutputDir
from hyperlora import pretrained

ImageToLoraDir = Annotated[Path, typer.Option(help="Folder of an image-to-LoRA model to update.")]


def fit_ood(
    train_portraits: Annotated[
        Path, typer.Argument(help="Drawn training portraits (`draw-portraits`).")
    ],
    val_portraits: Annotated[Path, typer.Argument(help="Drawn validation portraits.")],
    model: ImageToLoraDir = pretrained.IMAGE_TO_LORA_DIR,
    domain_name: Annotated[str, typer.Option(help="Plural noun for these images.")] = "avatars",
) -> None:
    """Fit the detector of photos outside the training data of an image-to-LoRA model."""
    from data_builder.release.calibration import fit_ood_detector

    threshold = fit_ood_detector(model, train_portraits, val_portraits, domain_name)
    typer.echo(f"{model}: photos at a distance above {threshold:.1f} are out of domain")


def export_identity(
    classifier: Annotated[
        Path, typer.Argument(help="Folder of the classifier whose encoder the model uses.")
    ],
    model: ImageToLoraDir = pretrained.IMAGE_TO_LORA_DIR,
) -> None:
    """Copy a classifier's identity space into an image-to-LoRA model, which then refines LoRAs by
    it.
    """
    from data_builder.release.calibration import export_identity_embedder

    typer.echo(
        f"{model}: identity embedding of width {export_identity_embedder(model, classifier)}"
    )


def calibrate_identity(
    portraits: Annotated[
        Path, typer.Argument(help="Drawn validation portraits, several of each identity.")
    ],
    evaluator: Annotated[
        Path, typer.Option(help="Folder of the classifier to update.")
    ] = pretrained.EVALUATOR_DIR,
) -> None:
    """Measure the identity scale of an evaluator: cosines between and within identities."""
    from data_builder.release.calibration import calibrate_identity_scale

    different, same = calibrate_identity_scale(evaluator, portraits)
    typer.echo(f"{evaluator}: {different:.3f} between identities, {same:.3f} within an identity")


def export_face_pack(
    detector: Annotated[Path, typer.Argument(help="Folder of a trained FaceDetector.")],
    recognizer: Annotated[Path, typer.Argument(help="Folder of a trained FaceRecognizer.")],
    output: OutputDir = pretrained.FACE_PACK_DIR,
) -> None:
    """Write a face pack that insightface loads: detector and recognizer as ONNX, with their
    SHA-256.
    """
    from data_builder.release.face_pack import write_face_pack

    typer.echo(f"{output}: {write_face_pack(detector, recognizer, output) / 1e6:.2f} MB")


def export_sample(
    dataset: Annotated[Path, typer.Argument(help="Folder of a pack or a build.")],
    output: OutputDir,
    max_bytes: Annotated[int, typer.Option(min=1, help="Limit of all files.")] = 2_000_000,
    statistics: Annotated[
        bool, typer.Option(help="Also mean and standard deviation of the rows.")
    ] = True,
) -> None:
    """Write the recipe of a dataset, its statistics and a few rows."""
    from data_builder.build.export_sample import export_dataset_sample
    from hyperlora.cli.options import check_output_dir

    check_output_dir(output)
    num_rows = export_dataset_sample(dataset, output, max_bytes, statistics)
    typer.echo(f"{output}: recipe{', statistics' if statistics else ''} and {num_rows} of the rows")


def prune_basis(
    model: Annotated[Path, typer.Argument(help="Folder of a released model with a learned basis.")],
    images: Annotated[
        Path,
        typer.Argument(help="Drawn training portraits (`draw-portraits`) or pairs (`draw-pairs`)."),
    ],
    output: OutputDir,
    basis_size: Annotated[int, typer.Option(min=1, help="Basis directions to keep.")] = 20,
) -> None:
    """Remove the basis directions that a network hardly uses, for a smaller file."""
    from data_builder.release.prune_basis import prune_basis_model

    error = prune_basis_model(model, images, output, basis_size)
    typer.echo(f"{output}: relative error of ΔW {error:.4f}")


def share_weights(
    model: Annotated[Path, typer.Argument(help="Folder of a released model.")],
    source_model: Annotated[str, typer.Argument(help="Name of a model in the same folder.")],
    component: Annotated[str, typer.Option(help="Component that both hold.")] = "encoder",
) -> None:
    """Remove a component that another model in the same folder holds too, for a smaller file."""
    from data_builder.release.share_weights import share_weights

    num_bytes = share_weights(model, component, source_model)
    typer.echo(f"{model}: {num_bytes / 1e6:.1f} MB shared with {source_model}")
