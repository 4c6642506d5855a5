"""What a face pack finds in drawn validation portraits, and how well it tells people apart.

python benchmarks/face_pack.py runs/data/validation --sizes 128 640 --reader runs/avatars/encoder/reader

Beside it, people told apart by the identity of a reader that sees the whole portrait.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data_builder.avatars.landmarks import landmarks
from data_builder.avatars.portrait_dataset import Portraits
from data_builder.datamodules.faces import background, faceless
from hyperlora import pretrained
from hyperlora.data.images import to_tensor
from hyperlora.encoders.attribute_classifier import Reader, read_in_batches
from hyperlora.encoders.face_analysis import FaceFinder

FALSE = 1e-3
"""Different people taken for one, of all pairs, where the share of the same people that are known is told."""


def found(portraits: Portraits, finder: FaceFinder) -> tuple[dict[str, float], Tensor]:
    """How well faces are found, and an embedding of each portrait (zeros where none was)."""
    errors, embeddings, others, began = [], [], 0, time.perf_counter()
    for i, pixels in enumerate(portraits.images):
        faces = finder.faces(Image.fromarray(pixels))
        truth = landmarks(portraits.person(i), portraits.scene(i), len(pixels))
        off = [np.linalg.norm(face.keypoints - truth.keypoints, axis=1).mean() for face in faces]
        hit = int(np.argmin(off)) if off and min(off) < len(pixels) / 12 else None
        others += len(faces) - (hit is not None)
        if hit is not None:
            errors.append(off[hit] * 128 / len(pixels))
        embedding = faces[hit].embedding if hit is not None else None
        embeddings.append(torch.zeros(512) if embedding is None else torch.as_tensor(embedding))
    figures = {
        "portraits": len(embeddings), "found": len(errors) / len(embeddings), "others": others,
        "keypoints off, mean": float(np.mean(errors)), "95 of 100": float(np.quantile(errors, 0.95)),
        "ms each": (time.perf_counter() - began) / len(embeddings) * 1e3,
    }  # fmt: skip
    return figures, torch.stack(embeddings)


def nobody(portraits: Portraits, n: int) -> Iterator[tuple[str, list[Image.Image]]]:
    """Pictures without a face."""
    rng = np.random.default_rng(0)
    yield "backgrounds and shapes", [background(rng, 128) for _ in range(n)]
    yield "noise", [Image.fromarray(rng.integers(0, 256, (128, 128, 3), np.uint8)) for _ in range(n)]
    yield "blank", [Image.new("RGB", (128, 128), tuple(rng.integers(0, 256, 3).tolist())) for _ in range(n)]
    chosen = rng.choice(len(portraits), n, replace=False).tolist()
    pictures = [Image.fromarray(np.array(portraits.images[i])) for i in chosen]
    places = [landmarks(portraits.person(i), portraits.scene(i), pictures[0].width) for i in chosen]
    pairs = list(zip(pictures, places, strict=True))
    yield "portraits, face hidden", [faceless(picture, face, rng) for picture, face in pairs]
    yield (
        "portraits, below the face",
        [picture.crop((0, int(face.box[3]), picture.width, picture.height)) for picture, face in pairs],
    )


def apart(embeddings: Tensor, each: int) -> dict[str, float]:
    """How well embeddings [people * each, width] tell people apart."""
    cosines = F.normalize(embeddings.float(), dim=-1) @ F.normalize(embeddings.float(), dim=-1).mT
    who = torch.arange(len(embeddings)) // each
    upper = torch.ones_like(cosines, dtype=torch.bool).triu(1)
    same, different = cosines[upper & (who[:, None] == who)], cosines[upper & (who[:, None] != who)]
    below = torch.searchsorted(different.sort().values, same) / len(different)
    levels = torch.linspace(-1, 1, 2001)
    right = torch.stack([((same > level).float().mean() + (different <= level).float().mean()) / 2 for level in levels])
    first = torch.arange(0, len(embeddings), each)
    probes = torch.ones(len(embeddings), dtype=torch.bool)
    probes[first] = False
    named = cosines[probes][:, first].argmax(1) == who[probes]
    known = same > different.sort().values[-max(1, int(FALSE * len(different)))]
    return {
        "AUC": float(below.mean()), "accuracy": float(right.max()),
        "same known at 1 in 1000": float(known.float().mean()),
        "rank 1": float(named.float().mean()), "same": float(same.mean()), "different": float(different.mean()),
    }  # fmt: skip


def read(portraits: Portraits, reader: Reader) -> Tensor:
    """The reader's identity of each portrait."""
    photos = torch.stack([to_tensor(Image.fromarray(x), reader.encoder.image_size) for x in portraits.images])
    return read_in_batches(reader, photos).identity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("portraits", type=Path)
    parser.add_argument("--pack", type=Path, default=pretrained.FACE_PACK)
    parser.add_argument("--reader", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128], help="sides that faces are looked for at")
    parser.add_argument("--without", type=int, default=200, help="pictures of each kind without a face")
    arguments = parser.parse_args()
    portraits, embeddings = Portraits(arguments.portraits), None
    for size in arguments.sizes:
        finder = FaceFinder(arguments.pack, size)
        figures, here = found(portraits, finder)
        embeddings = here if embeddings is None else embeddings
        print(f"at {size}:", *(f"{name} {value:.4g}" for name, value in figures.items()), sep="  ")
        for kind, pictures in nobody(portraits, arguments.without):
            alarms = sum(bool(finder.faces(picture)) for picture in pictures)
            print(f"at {size}:  {kind}: {alarms} of {len(pictures)} with a face")
    told = {"face pack": embeddings}
    if arguments.reader:
        told["reader"] = read(portraits, Reader.from_pretrained(arguments.reader))
    for name, vectors in told.items():
        figures = apart(vectors, portraits.plan.each)
        print(f"{name}:", *(f"{key} {value:.4g}" for key, value in figures.items()), sep="  ")


if __name__ == "__main__":
    main()
