"""Differential LoRAs: overfit one LoRA to the picture before, one to the picture after, keep after - before.

What both pictures share (person, pose, pixels) cancels, the change stays; it needs no prompt. Both start from the same
numbers and see the same noise, so that nothing but the pictures makes them differ. Several pairs of one change are
averaged, which leaves what they have in common.
"""

from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from hyperlora.data.images import read_image, to_tensor
from hyperlora.data.subjects import list_subjects
from hyperlora.diffusion.diffusion_base import DiffusionBase, load_diffusion_base
from hyperlora.diffusion.target_modules import make_layout
from hyperlora.diffusion.text_to_image import generate_images
from hyperlora.errors import InvalidArgumentError
from hyperlora.finetuning.refine import make_photo_examples
from hyperlora.finetuning.trainer import fine_tune_loras
from hyperlora.lora.io.metadata import LoraMetadata
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.weights import LoraWeights

STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)


def fit_differential_lora(
    base: DiffusionBase,
    before: Tensor,
    after: Tensor,
    *,
    preset: str = "attention+mlp",
    rank: int = 4,
    finetune_steps: int = 300,
    lr: float = 2e-3,
    batch_size: int = 2,
    prompt: str = "",
    seed: int = 0,
    label: str | None = None,
) -> LoraWeights:
    """The change from ``before`` to ``after``, both [pairs, 3, h, w] in [0, 1], as one LoRA of 2·``rank``.

    All 2·pairs LoRAs are fitted at once. Raises ``InvalidArgumentError`` if the numbers of pictures differ or a pair is twice the
    same picture.
    """
    check_pairs(before, after)
    component = next(iter(base.modules))
    layout = make_layout({component: base.denoiser}, preset, rank, base.id)
    examples = make_photo_examples(base, torch.cat([before, after])[:, None], prompt)
    init_std = (sum(s.in_features for s in layout.targets) / len(layout.targets)) ** -0.5
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        init_codes = (
            LoraWeights.zeros(layout, (), init_std)
            .flatten()
            .to(before.device)
            .expand(2 * len(before), -1)
        )
        loras = fine_tune_loras(
            base.denoiser,
            base.noise_scheduler,
            examples,
            init_codes,
            partial(LoraWeights.unflatten, layout),
            num_steps=finetune_steps,
            lr=lr,
            batch_size=batch_size,
            num_paired_groups=2,
            progress_label=label,
        ).weights
    num_pairs = len(before)
    differences = loras[slice(num_pairs, 2 * num_pairs)] - loras[slice(num_pairs)]
    return differences[0] if num_pairs == 1 else differences.mean()


def check_pairs(before: Tensor, after: Tensor) -> None:
    """Raises ``InvalidArgumentError`` if the numbers of pictures differ or a pair is twice the same picture."""
    if before.shape != after.shape:
        raise InvalidArgumentError(
            f"as many pictures before as after expected, got {len(before)} and {len(after)}"
        )
    if identical := [i for i in range(len(before)) if torch.equal(before[i], after[i])]:
        raise InvalidArgumentError(
            f"pair {identical[0] + 1} is twice the same picture: there is no change to learn"
        )


def render_slider_grid(
    base: DiffusionBase, lora: LoraWeights, prompt: str, seeds: range, num_inference_steps: int = 20
) -> Image.Image:
    """A sheet: one row per seed, one column per strength of ``STRENGTHS``."""
    rows, columns = len(seeds), len(STRENGTHS)
    weights = LoraWeights.stack([lora * s for _ in seeds for s in STRENGTHS])
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
    *,
    grid_path: Path | None,
    prompt: str,
    preset: str,
    rank: int,
    finetune_steps: int,
    lr: float,
    format: str,
) -> None:
    """Files to a file (and a slider sheet), as ``python -m data_builder fit_differential_lora`` does."""
    pairs = _match_pairs(before, after)
    image_pairs = [[read_image(path) for path in pair] for pair in pairs]
    for (before_path, after_path), (before_image, after_image) in zip(
        pairs, image_pairs, strict=True
    ):
        if before_image.size != after_image.size:
            raise InvalidArgumentError(
                f"{before_path.name} is {before_image.size[0]}x{before_image.size[1]}, {after_path.name} {after_image.size[0]}x{after_image.size[1]}: same size"
            )
    diffusion_base = load_diffusion_base(base)
    pixels = torch.stack(
        [
            torch.stack([to_tensor(image, diffusion_base.resolution) for image in pair])
            for pair in image_pairs
        ]
    )
    lora = fit_differential_lora(
        diffusion_base,
        pixels[:, 0],
        pixels[:, 1],
        preset=preset,
        rank=rank,
        finetune_steps=finetune_steps,
        lr=lr,
        label="fitting",
    )
    title = f"{before.stem} to {after.stem}"
    metadata = LoraMetadata(
        title=title,
        architecture=diffusion_base.architecture,
        resolution=(diffusion_base.resolution,) * 2,
    )
    save_lora(lora, output_path, format=format, metadata=metadata)  # type: ignore[arg-type]
    if grid_path is not None:
        grid_path.parent.mkdir(parents=True, exist_ok=True)
        render_slider_grid(diffusion_base, lora, prompt, range(4)).save(grid_path)


def _match_pairs(before: Path, after: Path) -> list[tuple[Path, Path]]:
    if before.is_dir() != after.is_dir():
        raise InvalidArgumentError(f"{before} and {after}: two images, or two folders, expected")
    if not before.is_dir():
        return [(before, after)]
    unmatched = {s.name: s.photos[0] for s in list_subjects(after)}
    pairs = [
        (s.photos[0], unmatched.pop(s.name)) for s in list_subjects(before) if s.name in unmatched
    ]
    if not pairs or unmatched:
        raise InvalidArgumentError(
            f"{before} and {after} must hold pictures of the same names, e.g. {min(unmatched, default='none')}"
        )
    return pairs
