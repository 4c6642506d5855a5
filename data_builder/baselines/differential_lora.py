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
from hyperlora.data.subjects import subjects_in
from hyperlora.diffusion.diffusion_base import Base, load_base
from hyperlora.diffusion.target_modules import layout_of
from hyperlora.diffusion.text_to_image import render
from hyperlora.errors import BadRequest
from hyperlora.finetuning.refine import photo_examples
from hyperlora.finetuning.trainer import fit
from hyperlora.lora.io.metadata import LoraHeader
from hyperlora.lora.io.save import save_lora
from hyperlora.lora.weights import LoraWeights

STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)


def differential(
    base: Base,
    before: Tensor,
    after: Tensor,
    *,
    preset: str = "attention+mlp",
    rank: int = 4,
    steps: int = 300,
    lr: float = 2e-3,
    batch: int = 2,
    prompt: str = "",
    seed: int = 0,
    label: str | None = None,
) -> LoraWeights:
    """The change from ``before`` to ``after``, both [pairs, 3, h, w] in [0, 1], as one LoRA of 2·``rank``.

    All 2·pairs LoRAs are fitted at once. Raises ``BadRequest`` if the numbers of pictures differ or a pair is twice the
    same picture.
    """
    check_pairs(before, after)
    component = next(iter(base.modules))
    layout = layout_of({component: base.denoiser}, preset, rank, base.id)
    examples = photo_examples(base, torch.cat([before, after])[:, None], prompt)
    std = (sum(s.fan_in for s in layout.sites) / len(layout.sites)) ** -0.5
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        start = LoraWeights.zeros(layout, (), std).flatten().to(before.device).expand(2 * len(before), -1)
        fitted = fit(
            base.denoiser, base.noise_schedule, examples, start, partial(LoraWeights.unflatten, layout),
            steps=steps, lr=lr, batch=batch, twins=2, label=label,
        ).weights  # fmt: skip
    n = len(before)
    changes = fitted[slice(n, 2 * n)] - fitted[slice(n)]
    return changes[0] if n == 1 else changes.mean()


def check_pairs(before: Tensor, after: Tensor) -> None:
    """Raises ``BadRequest`` if the numbers of pictures differ or a pair is twice the same picture."""
    if before.shape != after.shape:
        raise BadRequest(f"as many pictures before as after expected, got {len(before)} and {len(after)}")
    if same := [i for i in range(len(before)) if torch.equal(before[i], after[i])]:
        raise BadRequest(f"pair {same[0] + 1} is twice the same picture: there is no change to learn")


def slider(base: Base, change: LoraWeights, prompt: str, seeds: range, steps: int = 20) -> Image.Image:
    """A sheet: one row per seed, one column per strength of ``STRENGTHS``."""
    rows, columns = len(seeds), len(STRENGTHS)
    weights = LoraWeights.stack([change * s for _ in seeds for s in STRENGTHS])
    drawn = render(
        base,
        [prompt] * (rows * columns),
        weights,
        seeds=[seed for seed in seeds for _ in STRENGTHS],
        steps=steps,
    )
    width, height = drawn[0].size
    sheet = Image.new("RGB", (columns * width, rows * height))
    for i, picture in enumerate(drawn):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def build(
    before: Path, after: Path, base: str, out: Path, *, sheet: Path | None, prompt: str, preset: str, rank: int,
    steps: int, lr: float, format: str,
) -> None:  # fmt: skip
    """Files to a file (and a slider sheet), as ``python -m data_builder differential`` does."""
    pairs = _pairs(before, after)
    opened = [[read_image(path) for path in pair] for pair in pairs]
    for (first, second), (a, b) in zip(pairs, opened, strict=True):
        if a.size != b.size:
            raise BadRequest(
                f"{first.name} is {a.size[0]}x{a.size[1]}, {second.name} {b.size[0]}x{b.size[1]}: same size"
            )
    model = load_base(base)
    pixels = torch.stack([torch.stack([to_tensor(image, model.resolution) for image in pair]) for pair in opened])
    change = differential(
        model, pixels[:, 0], pixels[:, 1], preset=preset, rank=rank, steps=steps, lr=lr, label="fitting"
    )
    title = f"{before.stem} to {after.stem}"
    header = LoraHeader(title=title, architecture=model.architecture, resolution=(model.resolution,) * 2)
    save_lora(change, out, format=format, header=header)  # type: ignore[arg-type]
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        slider(model, change, prompt, range(4)).save(sheet)


def _pairs(before: Path, after: Path) -> list[tuple[Path, Path]]:
    if before.is_dir() != after.is_dir():
        raise BadRequest(f"{before} and {after}: two images, or two folders, expected")
    if not before.is_dir():
        return [(before, after)]
    there = {s.name: s.photos[0] for s in subjects_in(after)}
    found = [(s.photos[0], there.pop(s.name)) for s in subjects_in(before) if s.name in there]
    if not found or there:
        raise BadRequest(
            f"{before} and {after} must hold pictures of the same names, e.g. {min(there, default='none')}"
        )
    return found
