"""Differential LoRAs: the difference between a LoRA fitted to the image after an edit and one
before it.

What both images share (subject, pose, pixels) cancels, and the edit remains, without a prompt. Both
LoRAs start from the same factors and see the same noise, so that only the images make them differ.
The mean over several pairs of one edit keeps what they have in common.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from hyperlora.compute import ComputeConfig, fork_rng
from hyperlora.data.images import read_image, to_tensor
from hyperlora.data.subjects import list_subjects
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.errors import InvalidArgumentError
from hyperlora.finetuning.config import FineTuneConfig
from hyperlora.finetuning.refine import make_photo_examples
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.io.formats import FormatChoice
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.weights import LoraWeights

STRENGTHS: Final = (-2.0, -1.0, 0.0, 1.0, 2.0)


@dataclass(frozen=True)
class DifferentialLoraConfig:
    """Settings of ``fit_differential_lora``.

    Attributes:
        preset: Adapted modules.
        rank: Rank of each fitted LoRA; the difference has twice the rank.
        finetune_steps: Optimizer steps.
        lr: Learning rate of Adam.
        batch_size: Examples of each LoRA per step.
        prompt: Prompt of all images.
        seed: Seed of the initial factors, timesteps and noise.
    """

    preset: str = "attention+mlp"
    rank: int = 4
    finetune_steps: int = 300
    lr: float = 2e-3
    batch_size: int = 2
    prompt: str = ""
    seed: int = 0


def fit_differential_lora(
    base: DiffusionBase,
    before: Tensor,
    after: Tensor,
    config: DifferentialLoraConfig | None = None,
    *,
    progress_label: str | None = None,
) -> LoraWeights:
    """Fit a LoRA to each image of before/after pairs and return the mean difference, after -
    before.

    All 2 · pairs LoRAs are fitted at once. Both LoRAs of a pair start from the same factors and see
    the same timesteps and noise.

    Args:
        base: Frozen base model.
        before: Images before the edit [pairs, 3, h, w] in [0, 1].
        after: Images after the edit [pairs, 3, h, w] in [0, 1].
        config: Settings of the fit.
        progress_label: Label of a progress bar; None: no bar.

    Returns:
        One LoRA of rank 2 · ``config.rank``.

    Raises:
        InvalidArgumentError: If the numbers of images differ or the images of a pair are equal.
    """
    config = config or DifferentialLoraConfig()
    check_pairs(before, after)
    num_pairs = len(before)
    layout = base.make_layout(config.preset, config.rank)
    images = torch.cat([before, after])[:, None]  # [2 * pairs, 1, 3, h, w]
    examples = make_photo_examples(base, images, config.prompt)
    with fork_rng(base.device):
        torch.manual_seed(config.seed)  # one random stream for the start and for the training
        init_lora = LoraWeights.zeros(layout, (), layout.init_std)
        init_codes = init_lora.flatten().expand(2 * num_pairs, -1)
        loras = fine_tune_loras(
            base,
            examples,
            init_codes,
            partial(LoraWeights.unflatten, layout),
            FineTuneConfig(
                num_steps=config.finetune_steps,
                lr=config.lr,
                batch_size=config.batch_size,
                num_paired_groups=2,
                progress_label=progress_label,
            ),
        ).weights
    differences = loras[slice(num_pairs, 2 * num_pairs)] - loras[slice(num_pairs)]
    return differences[0] if num_pairs == 1 else differences.mean()


def check_pairs(before: Tensor, after: Tensor) -> None:
    """Check that images form pairs with a visible difference.

    Args:
        before: Images before the edit [pairs, 3, h, w].
        after: Images after the edit.

    Raises:
        InvalidArgumentError: If the numbers of images differ or the images of a pair are equal.
    """
    if before.shape != after.shape:
        raise InvalidArgumentError(
            f"as many images before as after expected, got {len(before)} and {len(after)}"
        )
    if identical := [i for i in range(len(before)) if torch.equal(before[i], after[i])]:
        raise InvalidArgumentError(
            f"pair {identical[0] + 1} is twice the same image: there is no edit to learn"
        )


def render_slider_grid(
    base: DiffusionBase, lora: LoraWeights, prompt: str, seeds: range, num_inference_steps: int = 20
) -> Image.Image:
    """Render images at all ``STRENGTHS`` of a LoRA.

    Args:
        base: Base model.
        lora: One LoRA.
        prompt: Prompt of all images.
        seeds: Seeds, one row each.
        num_inference_steps: Denoising steps.

    Returns:
        Grid of one row per seed and one column per strength.
    """
    rows, columns = len(seeds), len(STRENGTHS)
    weights = LoraWeights.stack([lora * strength for _ in seeds for strength in STRENGTHS])
    images = generate_images(
        base,
        [prompt] * (rows * columns),
        weights,
        seeds=[seed for seed in seeds for _ in STRENGTHS],
        num_inference_steps=num_inference_steps,
    )
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, rows * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid


def build_differential_lora(
    before: Path,
    after: Path,
    base: str,
    output_path: Path,
    config: DifferentialLoraConfig,
    *,
    compute: ComputeConfig | None = None,
    format: FormatChoice = "auto",
    grid_path: Path | None = None,
    grid_prompt: str = "a portrait of a person",
) -> None:
    """Fit a differential LoRA to image files and write it, as ``data-builder
    fit-differential-lora`` does.

    Args:
        before: Image before the edit, or a folder of images.
        after: Image after the edit, or a folder of images under the same names.
        base: Base model, a folder or hub id.
        output_path: LoRA file to write.
        config: Settings of the fit.
        compute: Device and precision of the base model.
        format: Format of the LoRA file.
        grid_path: PNG to write of images at all ``STRENGTHS``; None: none.
        grid_prompt: Prompt of these images.

    Raises:
        InvalidArgumentError: If files do not form pairs of equal size, or the images are equal.
        InvalidImageError: If a file cannot be read.
    """
    pairs = [_read_pair(*paths) for paths in _match_pairs(before, after)]
    diffusion_base = load_diffusion_base(base, compute)
    resolution = diffusion_base.resolution
    pixels = torch.stack(
        [torch.stack([to_tensor(image, resolution) for image in pair]) for pair in pairs]
    )  # [pairs, 2, 3, resolution, resolution]
    weights = fit_differential_lora(
        diffusion_base, pixels[:, 0], pixels[:, 1], config, progress_label="fitting"
    )
    metadata = LoraMetadata(
        title=f"{before.stem} to {after.stem}",
        architecture=diffusion_base.architecture,
        resolution=(resolution, resolution),
    )
    save_lora(weights, output_path, format=format, metadata=metadata)
    if grid_path is not None:
        grid_path.parent.mkdir(parents=True, exist_ok=True)
        render_slider_grid(diffusion_base, weights, grid_prompt, range(4)).save(grid_path)


def _read_pair(before: Path, after: Path) -> tuple[Image.Image, Image.Image]:
    """Read two images of equal size."""
    before_image, after_image = read_image(before), read_image(after)
    if before_image.size != after_image.size:
        raise InvalidArgumentError(
            f"{before.name} is {before_image.width}x{before_image.height}, "
            f"{after.name} {after_image.width}x{after_image.height}: the same size is expected"
        )
    return before_image, after_image


def _match_pairs(before: Path, after: Path) -> list[tuple[Path, Path]]:
    """Match two files, or the files of two folders by name."""
    if before.is_dir() != after.is_dir():
        raise InvalidArgumentError(f"{before} and {after}: two images, or two folders, expected")
    if not before.is_dir():
        return [(before, after)]
    unmatched = {subject.name: subject.photos[0] for subject in list_subjects(after)}
    pairs = [
        (subject.photos[0], unmatched.pop(subject.name))
        for subject in list_subjects(before)
        if subject.name in unmatched
    ]
    if not pairs or unmatched:
        raise InvalidArgumentError(
            f"{before} and {after} must hold images of the same names, "
            f"e.g. {min(unmatched, default='none')}"
        )
    return pairs
