"""Commands that fit baselines and regression targets."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, cast

import typer

from hyperlora.cli.compute_options import ComputeOptions, add_compute_options
from hyperlora.cli.options import FORMAT_HELP

if TYPE_CHECKING:
    from hyperlora.lora.io.formats import FormatChoice

# offload is left out: gradients flow through the base
_OPTION_NAMES: Final = ("device", "dtype")


@add_compute_options("a lower --rank", _OPTION_NAMES)
def fit_differential_lora(
    *,
    compute_options: ComputeOptions,
    before: Annotated[Path, typer.Argument(help="Image, or folder of images.")],
    after: Annotated[Path, typer.Argument(help="Image, or folder of images under the same names.")],
    base: Annotated[str, typer.Option(help="Base model: folder or hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write (.safetensors).")],
    slider_grid: Annotated[
        Path | None, typer.Option(help="Also write images at strengths -2 to +2 to this PNG.")
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="Prompt of the slider grid.")
    ] = "a portrait of a person",
    preset: Annotated[str, typer.Option(help="Adapted modules.")] = "attention+mlp",
    rank: Annotated[
        int, typer.Option(min=1, help="Rank of each fit; the result has twice the rank.")
    ] = 4,
    finetune_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 300,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    format: Annotated[str, typer.Option(help=FORMAT_HELP)] = "auto",
) -> None:
    """Fit a LoRA to each image of before/after pairs and write the difference: a slider."""
    from data_builder.baselines.differential_lora import (
        DifferentialLoraConfig,
        build_differential_lora,
    )

    build_differential_lora(
        before,
        after,
        base,
        output,
        DifferentialLoraConfig(preset, rank, finetune_steps, lr),
        compute=compute_options.make_config(),
        format=cast("FormatChoice", format),
        grid_path=slider_grid,
        grid_prompt=prompt,
    )


@add_compute_options("a smaller --subjects-per-batch", _OPTION_NAMES)
def fit_lidb_targets(
    *,
    compute_options: ComputeOptions,
    portraits: Annotated[Path, typer.Argument(help="Drawn portraits (`draw-portraits`).")],
    base: Annotated[str, typer.Option(help="Folder of the base model.")],
    vae: Annotated[str, typer.Option(help="Folder of the VAE that encodes the portraits.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write (.safetensors).")],
    num_subjects: Annotated[int, typer.Option(min=1, help="Number of identities.")] = 256,
    subjects_per_batch: Annotated[
        int, typer.Option(min=1, help="Identities fitted together.")
    ] = 32,
    finetune_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 150,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-2,
    preset: Annotated[str, typer.Option(help="Adapted modules.")] = "attention+mlp",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRAs.")] = 1,
    a: Annotated[int, typer.Option(min=1, help="Rows of the frozen basis (LiDB).")] = 100,
    b: Annotated[int, typer.Option(min=1, help="Columns of the frozen basis (LiDB).")] = 50,
) -> None:
    """Fit LiDB codes to drawn portraits: the regression targets of HyperDreamBooth."""
    from data_builder.baselines.lidb_targets import LidbTargetConfig, fit_lidb_targets
    from hyperlora.cpu import disable_malloc_trim

    disable_malloc_trim()
    config = LidbTargetConfig(
        num_subjects, subjects_per_batch, finetune_steps, lr, preset, rank, a, b
    )
    fit_lidb_targets(portraits, base, vae, output, config, compute_options.make_config())


def fit_pca(
    dataset: Annotated[
        Path, typer.Argument(help="Folder of a pack or a build; its train split is used.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the LoraCodec to write.")
    ],
    num_tokens: Annotated[int, typer.Option(min=1, help="Latent tokens of a LoRA.")] = 8,
    token_dim: Annotated[int, typer.Option(min=1, help="Width of each token.")] = 16,
    components_per_factor: Annotated[
        int, typer.Option(min=0, help="Components of each factor; 0: joint components only.")
    ] = 20,
    canonical: Annotated[
        bool,
        typer.Option("--canonical", help="First bring factors to equal singular values."),
    ] = False,
) -> None:
    """Fit a PCA codec to a dataset of LoRAs: the closed-form baseline of a trained autoencoder."""
    from hyperlora.cli.options import check_output_dir
    from hyperlora.data.lora_dataset import LoraDataset
    from hyperlora.pipelines.lora_codec import LoraCodec

    check_output_dir(output)
    data = LoraDataset(dataset, "train")
    codec = LoraCodec.fit_pca(data, num_tokens, token_dim, canonical, components_per_factor or None)
    codec.save_pretrained(output)
    num_parameters, latent_size = data.layout.numel, f"{num_tokens} x {token_dim}"
    typer.echo(
        f"{output}: {latent_size} latents for {num_parameters} parameters, {len(data)} LoRAs"
    )
