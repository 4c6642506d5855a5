"""Checks of before/after images: false alarms on real pairs, detection rate on shuffled pairs, and
the visible change of edits against that of saving and resizing.

data-builder draw-pairs -o runs/data/edits-validation --split validation --num-edits 160
python -m benchmarks.robustness.pair_input_checks [runs/data/edits-validation]
"""

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from data_builder.avatars.pair_dataset import PairDataset
from hyperlora.data.images import array_to_tensor, read_image, to_image, to_tensor
from hyperlora.pipelines.input_checks import (
    CHANGE_THRESHOLD,
    SIMILARITY_THRESHOLD,
    compute_change,
    compute_structural_similarity,
)

NUM_NOISE_IMAGES = 60


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("pairs", type=Path, nargs="?", default=Path("runs/data/edits-validation"))
    dataset = PairDataset(parser.parse_args().pairs)
    images = array_to_tensor(dataset.images)  # [2 * pairs, 3, h, w]
    before, after = images[0::2], images[1::2]
    for name, others in (("own pair", after), ("shuffled pair", after.roll(2, 0))):
        is_rejected = [
            compute_structural_similarity(first, second) < SIMILARITY_THRESHOLD
            for first, second in zip(before, others, strict=True)
        ]
        rate = sum(is_rejected) / len(is_rejected)
        print(f"{name}: {rate:.1%} of {len(is_rejected)} rejected as unrelated")
    edits = [compute_change(first, second) for first, second in zip(before, after, strict=True)]
    print(f"edits: least change {min(edits):.3f}, threshold {CHANGE_THRESHOLD}")
    largest_noise: dict[str, float] = {}
    for image in before[:NUM_NOISE_IMAGES]:
        for name, copy in list_copies(to_image(image)):
            change = compute_change(image, to_tensor(copy, image.shape[-1]))
            largest_noise[name] = max(change, largest_noise.get(name, 0.0))
    for name, change in largest_noise.items():
        print(f"{name}: largest change {change:.3f}")


def list_copies(image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """Save and resize an image in usual ways."""
    for quality in (75, 85, 95, 100):
        for subsampling in (0, 2):
            options = {"quality": quality, "subsampling": subsampling}
            yield f"JPEG {quality}, subsampling {subsampling}", save(image, "JPEG", **options)
    yield "JPEG twice", save(save(image, "JPEG", quality=85), "JPEG", quality=75)
    yield "WEBP", save(image, "WEBP", quality=80)
    yield "256 colors", image.quantize(256).convert("RGB")
    for factor in (0.5, 0.75, 1.5, 2):
        resized = image.resize([round(side * factor) for side in image.size])
        yield f"resize {factor}", resized
        yield f"resize {factor} and back, JPEG 75", save(resized.resize(image.size), "JPEG")


def save(image: Image.Image, format_name: str, **options: int) -> Image.Image:
    """Save an image in memory and read it again."""
    file = io.BytesIO()
    image.save(file, format_name, **options)
    return read_image(file.getvalue())


if __name__ == "__main__":
    main()
