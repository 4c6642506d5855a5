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

from data_builder.avatars.landmarks import compute_landmarks
from data_builder.avatars.portrait_dataset import PortraitDataset
from data_builder.datamodules.face_scenes import generate_background, remove_face
from hyperlora import pretrained
from hyperlora.data.images import to_tensor
from hyperlora.encoders.attribute_classifier import AttributeClassifier, predict_in_batches
from hyperlora.encoders.face_analysis import FaceAnalyzer

FALSE_MATCH_RATE = 1e-3
"""Different people taken for one, of all pairs, where the share of the same people that are known is told."""


def evaluate_detection(
    portraits: PortraitDataset, analyzer: FaceAnalyzer
) -> tuple[dict[str, float], Tensor]:
    """How well faces are found, and an embedding of each portrait (zeros where none was)."""
    errors, embeddings, false_positives, start_time = [], [], 0, time.perf_counter()
    for i, pixels in enumerate(portraits.images):
        faces = analyzer.detect_faces(Image.fromarray(pixels))
        truth = compute_landmarks(portraits.get_identity(i), portraits.get_scene(i), len(pixels))
        distances = [
            np.linalg.norm(face.keypoints - truth.keypoints, axis=1).mean() for face in faces
        ]
        hit = int(np.argmin(distances)) if distances and min(distances) < len(pixels) / 12 else None
        false_positives += len(faces) - (hit is not None)
        if hit is not None:
            errors.append(distances[hit] * 128 / len(pixels))
        embedding = faces[hit].embedding if hit is not None else None
        embeddings.append(torch.zeros(512) if embedding is None else torch.as_tensor(embedding))
    figures = {
        "portraits": len(embeddings),
        "found": len(errors) / len(embeddings),
        "others": false_positives,
        "keypoints off, mean": float(np.mean(errors)),
        "95 of 100": float(np.quantile(errors, 0.95)),
        "ms each": (time.perf_counter() - start_time) / len(embeddings) * 1e3,
    }
    return figures, torch.stack(embeddings)


def generate_faceless_images(
    portraits: PortraitDataset, n: int
) -> Iterator[tuple[str, list[Image.Image]]]:
    """Pictures without a face."""
    rng = np.random.default_rng(0)
    yield "backgrounds and shapes", [generate_background(rng, 128) for _ in range(n)]
    yield (
        "noise",
        [Image.fromarray(rng.integers(0, 256, (128, 128, 3), np.uint8)) for _ in range(n)],
    )
    yield (
        "blank",
        [Image.new("RGB", (128, 128), tuple(rng.integers(0, 256, 3).tolist())) for _ in range(n)],
    )
    chosen = rng.choice(len(portraits), n, replace=False).tolist()
    images = [Image.fromarray(np.array(portraits.images[i])) for i in chosen]
    face_landmarks = [
        compute_landmarks(portraits.get_identity(i), portraits.get_scene(i), images[0].width)
        for i in chosen
    ]
    pairs = list(zip(images, face_landmarks, strict=True))
    yield "portraits, face hidden", [remove_face(picture, face, rng) for picture, face in pairs]
    yield (
        "portraits, below the face",
        [
            picture.crop((0, int(face.box[3]), picture.width, picture.height))
            for picture, face in pairs
        ],
    )


def evaluate_verification(embeddings: Tensor, images_per_subject: int) -> dict[str, float]:
    """How well embeddings [people * each, width] tell people apart."""
    cosines = F.normalize(embeddings.float(), dim=-1) @ F.normalize(embeddings.float(), dim=-1).mT
    labels = torch.arange(len(embeddings)) // images_per_subject
    upper = torch.ones_like(cosines, dtype=torch.bool).triu(1)
    same, different = (
        cosines[upper & (labels[:, None] == labels)],
        cosines[upper & (labels[:, None] != labels)],
    )
    below = torch.searchsorted(different.sort().values, same) / len(different)
    levels = torch.linspace(-1, 1, 2001)
    accuracies = torch.stack(
        [
            ((same > level).float().mean() + (different <= level).float().mean()) / 2
            for level in levels
        ]
    )
    first = torch.arange(0, len(embeddings), images_per_subject)
    probes = torch.ones(len(embeddings), dtype=torch.bool)
    probes[first] = False
    is_rank1_correct = cosines[probes][:, first].argmax(1) == labels[probes]
    is_true_match = same > different.sort().values[-max(1, int(FALSE_MATCH_RATE * len(different)))]
    return {
        "AUC": float(below.mean()),
        "accuracy": float(accuracies.max()),
        "same known at 1 in 1000": float(is_true_match.float().mean()),
        "rank 1": float(is_rank1_correct.float().mean()),
        "same": float(same.mean()),
        "different": float(different.mean()),
    }


def predict_identities(portraits: PortraitDataset, reader: AttributeClassifier) -> Tensor:
    """The reader's identity of each portrait."""
    photos = torch.stack(
        [to_tensor(Image.fromarray(x), reader.encoder.image_size) for x in portraits.images]
    )
    return predict_in_batches(reader, photos).identity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("portraits", type=Path)
    parser.add_argument("--pack", type=Path, default=pretrained.FACE_PACK_DIR)
    parser.add_argument("--reader", type=Path)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[128], help="sides that faces are looked for at"
    )
    parser.add_argument(
        "--without", type=int, default=200, help="pictures of each kind without a face"
    )
    arguments = parser.parse_args()
    portraits, embeddings = PortraitDataset(arguments.portraits), None
    for size in arguments.sizes:
        analyzer = FaceAnalyzer(arguments.pack, size)
        figures, size_embeddings = evaluate_detection(portraits, analyzer)
        embeddings = size_embeddings if embeddings is None else embeddings
        print(f"at {size}:", *(f"{name} {value:.4g}" for name, value in figures.items()), sep="  ")
        for kind, pictures in generate_faceless_images(portraits, arguments.without):
            num_false_alarms = sum(bool(analyzer.detect_faces(picture)) for picture in pictures)
            print(f"at {size}:  {kind}: {num_false_alarms} of {len(pictures)} with a face")
    embeddings_by_source = {"face pack": embeddings}
    if arguments.reader:
        embeddings_by_source["reader"] = predict_identities(
            portraits, AttributeClassifier.from_pretrained(arguments.reader)
        )
    for name, vectors in embeddings_by_source.items():
        figures = evaluate_verification(vectors, portraits.config.portraits_per_identity)
        print(f"{name}:", *(f"{key} {value:.4g}" for key, value in figures.items()), sep="  ")


if __name__ == "__main__":
    main()
