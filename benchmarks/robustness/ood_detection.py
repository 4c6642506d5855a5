"""Out-of-distribution detector of the bundled model: false alarms on test portraits, detection of
other images.

    python -m benchmarks.robustness.ood_detection [FOLDER ...]

Photographs are those of scikit-image, and its faces of `lfw_subset`, if it is installed
(`hyperlora[face]`).
"""

import argparse
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from hyperlora import pretrained
from hyperlora.data.image_formats import UPLOAD_FORMATS, get_format_of_suffix
from hyperlora.data.images import list_image_files, read_image, to_tensor
from hyperlora.features import ImageFeatures
from hyperlora.pipelines.image_to_lora import ImageToLora

SIZE = 128


def load_test_portraits() -> list[Image.Image]:
    """Load all photos of the bundled test subjects."""
    subject_dirs = sorted((pretrained.BENCHMARK_DIR / "subjects").iterdir())
    return [read_image(photo) for folder in subject_dirs for photo in list_image_files(folder)]


def generate_unnatural_images(
    rng: np.random.Generator, num_images: int = 50
) -> Iterator[tuple[str, list[Image.Image]]]:
    """Generate images that are no portraits.

    Args:
        rng: Random generator.
        num_images: Images of each kind.

    Yields:
        Name of the kind, and its images.
    """

    def resize_noise(num_cells: int, resampling: Image.Resampling) -> list[Image.Image]:
        shape = (num_images, num_cells, num_cells, 3)
        noise = rng.integers(0, 256, shape, dtype=np.uint8)
        return [Image.fromarray(pixels).resize((SIZE, SIZE), resampling) for pixels in noise]

    yield "noise", resize_noise(SIZE, Image.Resampling.NEAREST)
    yield "colored tiles", resize_noise(8, Image.Resampling.NEAREST)
    yield "gradients", resize_noise(2, Image.Resampling.BILINEAR)
    yield "one color", resize_noise(1, Image.Resampling.NEAREST)
    yield "pages of text", [_render_text_page(rng) for _ in range(num_images)]


def load_photographs() -> Iterator[tuple[str, list[Image.Image]]]:
    """Load the photographs of scikit-image, if it is installed, by kind."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent / "data"
    paths = [p for p in list_image_files(folder) if get_format_of_suffix(p) in UPLOAD_FORMATS]
    yield "images of scikit-image", [read_image(p) for p in paths]
    patches = np.load(folder / "lfw_subset.npy")
    images = [
        Image.fromarray((x * 255).astype(np.uint8)).convert("RGB").resize((SIZE, SIZE))
        for x in patches
    ]
    yield "faces (25 pixels, LFW)", images[:100]
    yield "other patches (25 pixels, LFW)", images[100:]


def compute_rejection_rate(model: ImageToLora, images: Sequence[Image.Image]) -> float:
    """Compute the fraction of images that the model calls out of domain.

    Args:
        model: Model with an out-of-distribution detector.
        images: Images.

    Returns:
        Fraction, 0 to 1.
    """
    assert model.ood_detector is not None
    photos = torch.stack([to_tensor(p, model.encoder.image_size) for p in images])
    tokens = torch.cat(
        [model.encode_photos(part[:, None]).image.tokens for part in photos.split(64)]
    )
    return float((~model.ood_detector.is_in_domain(ImageFeatures(tokens))).float().mean())


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", type=Path, nargs="*", help="Further images, by folder.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = ImageToLora.from_pretrained(pretrained.IMAGE_TO_LORA_DIR)
    portraits = load_test_portraits()
    kinds = [
        ("test portraits (false alarms)", portraits),
        ("  upside down", [ImageOps.flip(p) for p in portraits]),
        ("  inverted (a style of the training)", [ImageOps.invert(p) for p in portraits]),
        *generate_unnatural_images(np.random.default_rng(0)),
        *load_photographs(),
        *((str(f), [read_image(p) for p in list_image_files(f)]) for f in arguments.folders),
    ]
    for name, images in kinds:
        rate = compute_rejection_rate(model, images)
        print(f"{name:38s} {rate:6.1%} of {len(images)} out of domain", flush=True)


def _render_text_page(rng: np.random.Generator) -> Image.Image:
    page = Image.new("RGB", (SIZE, SIZE), "white")
    for y in range(4, SIZE - 8, 11):
        text = "".join(rng.choice(list("etaoin shrdlu cmfwyp vbgkjq"), 20))
        ImageDraw.Draw(page).text((4, y), text, fill="black")
    return page


if __name__ == "__main__":
    main()
