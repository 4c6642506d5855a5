"""How often pictures count as unknown to the bundle's model: drawn test portraits, and others of all kinds.

python benchmarks/domain.py [FOLDER OF PICTURES ...]

Photographs are those that scikit-image brings, and its faces of `lfw_subset`, if it is installed (`hyperlora[face]`).
"""

import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from hyperlora import pretrained
from hyperlora.data.images import list_image_files, read_image, to_tensor
from hyperlora.features import ImageFeatures
from hyperlora.pipelines.image_to_lora import ImageToLora

SIZE = 128


def load_test_portraits() -> list[Image.Image]:
    """All photos of the bundle's test people."""
    subject_dirs = sorted((pretrained.BENCHMARK_DIR / "subjects").iterdir())
    return [read_image(photo) for person in subject_dirs for photo in list_image_files(person)]


def generate_unnatural_images(
    random: np.random.Generator, n: int = 50
) -> Iterator[tuple[str, list[Image.Image]]]:
    """Pictures that nobody draws as a portrait."""

    def resize_noise(cells: int, how: Image.Resampling) -> list[Image.Image]:
        small = random.integers(0, 256, (n, cells, cells, 3), dtype=np.uint8)
        return [Image.fromarray(x).resize((SIZE, SIZE), how) for x in small]

    yield "noise", resize_noise(SIZE, Image.Resampling.NEAREST)
    yield "coloured tiles", resize_noise(8, Image.Resampling.NEAREST)
    yield "gradients", resize_noise(2, Image.Resampling.BILINEAR)
    yield "one colour", resize_noise(1, Image.Resampling.NEAREST)
    yield "pages of text", [_render_text_page(random) for _ in range(n)]


def load_photographs() -> Iterator[tuple[str, list[Image.Image]]]:
    """What scikit-image brings in its wheel."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent / "data"
    yield "pictures of scikit-image", [read_image(p) for p in list_image_files(folder)]
    patches = np.load(folder / "lfw_subset.npy")
    images = [
        Image.fromarray((x * 255).astype(np.uint8)).convert("RGB").resize((SIZE, SIZE))
        for x in patches
    ]
    yield "faces (25 pixels, LFW)", images[:100]
    yield "other patches (25 pixels, LFW)", images[100:]


def compute_rejection_rate(model: ImageToLora, images: Sequence[Image.Image]) -> float:
    """The fraction that the model does not know."""
    assert model.ood_detector is not None
    photos = torch.stack([to_tensor(p, model.encoder.image_size) for p in images])
    tokens = torch.cat([model.encode_photos(part[:, None]).image.tokens for part in photos.split(64)])
    return float((~model.ood_detector.is_in_domain(ImageFeatures(tokens))).float().mean())


def main() -> None:
    torch.set_num_threads(1)
    model = ImageToLora.from_pretrained(pretrained.IMAGE_TO_LORA_DIR)
    portraits = load_test_portraits()
    kinds = [
        ("test portraits (false alarms)", portraits),
        ("  upside down", [ImageOps.flip(p) for p in portraits]),
        ("  inverted (a style of the training)", [ImageOps.invert(p) for p in portraits]),
        *generate_unnatural_images(np.random.default_rng(0)),
        *load_photographs(),
        *((folder, [read_image(p) for p in list_image_files(folder)]) for folder in sys.argv[1:]),
    ]
    for name, pictures in kinds:
        print(
            f"{name:38s} {compute_rejection_rate(model, pictures):6.1%} of {len(pictures)} unknown",
            flush=True,
        )


def _render_text_page(random: np.random.Generator) -> Image.Image:
    page = Image.new("RGB", (SIZE, SIZE), "white")
    for y in range(4, SIZE - 8, 11):
        words = "".join(random.choice(list("etaoin shrdlu cmfwyp vbgkjq"), 20))
        ImageDraw.Draw(page).text((4, y), words, fill="black")
    return page


if __name__ == "__main__":
    main()
