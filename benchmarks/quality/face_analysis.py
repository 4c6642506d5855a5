"""Face pack on drawn validation portraits: recall, keypoint error, false positives, verification.

    python -m benchmarks.quality.face_analysis runs/data/validation --sizes 128 640
        --attribute-classifier runs/avatars/08_photo_encoder/classifier

For comparison, verification by the identity embedding of a classifier that sees the whole portrait.
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
"""Share of pairs of different subjects above the threshold of the true match rate."""


def evaluate_detection(
    portraits: PortraitDataset, analyzer: FaceAnalyzer
) -> tuple[dict[str, float], Tensor]:
    """Compare detected faces with the landmarks of drawn portraits.

    Args:
        portraits: Drawn portraits.
        analyzer: Face pack.

    Returns:
        Figures by name, and the embedding of each portrait [n, width] (zeros without a face).
    """
    errors, embeddings, num_false_positives, start_time = [], [], 0, time.perf_counter()
    for i, pixels in enumerate(portraits.images):
        faces = analyzer.detect_faces(Image.fromarray(pixels))
        landmarks = compute_landmarks(
            portraits.get_identity(i), portraits.get_scene(i), len(pixels)
        )
        distances = [
            np.linalg.norm(face.keypoints - landmarks.keypoints, axis=1).mean() for face in faces
        ]
        # a face is found if its keypoints are within 1/12 of the image on average
        is_found = bool(distances) and min(distances) < len(pixels) / 12
        found_index = int(np.argmin(distances)) if is_found else None
        num_false_positives += len(faces) - is_found
        embedding = None
        if found_index is not None:
            errors.append(distances[found_index] * 128 / len(pixels))
            embedding = faces[found_index].embedding
        embeddings.append(torch.zeros(512) if embedding is None else torch.as_tensor(embedding))
    figures = {
        "portraits": len(embeddings),
        "recall": len(errors) / len(embeddings),
        "false positives": num_false_positives,
        "keypoint error, mean": float(np.mean(errors)),
        "95th percentile": float(np.quantile(errors, 0.95)),
        "ms each": (time.perf_counter() - start_time) / len(embeddings) * 1e3,
    }
    return figures, torch.stack(embeddings)


def generate_faceless_images(
    portraits: PortraitDataset, num_images: int
) -> Iterator[tuple[str, list[Image.Image]]]:
    """Generate images without a face.

    Args:
        portraits: Drawn portraits, whose faces are removed.
        num_images: Images of each kind.

    Yields:
        Name of the kind, and its images.
    """
    rng = np.random.default_rng(0)
    yield "backgrounds and shapes", [generate_background(rng, 128) for _ in range(num_images)]
    noise = [rng.integers(0, 256, (128, 128, 3), np.uint8) for _ in range(num_images)]
    yield "noise", [Image.fromarray(pixels) for pixels in noise]
    colors = [tuple(rng.integers(0, 256, 3).tolist()) for _ in range(num_images)]
    yield "blank", [Image.new("RGB", (128, 128), color) for color in colors]
    indices = rng.choice(len(portraits), num_images, replace=False).tolist()
    images = [Image.fromarray(np.array(portraits.images[i])) for i in indices]
    landmarks = [
        compute_landmarks(portraits.get_identity(i), portraits.get_scene(i), images[0].width)
        for i in indices
    ]
    pairs = list(zip(images, landmarks, strict=True))
    yield "portraits, face removed", [remove_face(image, face, rng) for image, face in pairs]
    yield (
        "portraits, below the face",
        [image.crop((0, int(face.box[3]), image.width, image.height)) for image, face in pairs],
    )


def evaluate_verification(embeddings: Tensor, images_per_subject: int) -> dict[str, float]:
    """Evaluate how well embeddings verify identities.

    Args:
        embeddings: Embeddings [subjects * images_per_subject, width], subject after subject.
        images_per_subject: Images of each subject.

    Returns:
        Figures by name.
    """
    directions = F.normalize(embeddings.float(), dim=-1)
    cosines = directions @ directions.mT  # [n, n]
    labels = torch.arange(len(embeddings)) // images_per_subject
    is_pair = torch.ones_like(cosines, dtype=torch.bool).triu(1)
    same = cosines[is_pair & (labels[:, None] == labels)]
    different = cosines[is_pair & (labels[:, None] != labels)].sort().values
    # AUC: probability that a pair of one subject has the higher cosine
    ranks = torch.searchsorted(different, same) / len(different)
    accuracies = [
        ((same > threshold).float().mean() + (different <= threshold).float().mean()) / 2
        for threshold in torch.linspace(-1, 1, 2001)
    ]
    gallery = torch.arange(0, len(embeddings), images_per_subject)
    is_probe = torch.ones(len(embeddings), dtype=torch.bool)
    is_probe[gallery] = False
    nearest = cosines[is_probe][:, gallery].argmax(1)
    num_false_matches = max(1, int(FALSE_MATCH_RATE * len(different)))
    is_match = same > different[-num_false_matches]
    return {
        "AUC": float(ranks.mean()),
        "accuracy": float(torch.stack(accuracies).max()),
        f"true match rate at {FALSE_MATCH_RATE:g}": float(is_match.float().mean()),
        "rank 1": float((nearest == labels[is_probe]).float().mean()),
        "same": float(same.mean()),
        "different": float(different.mean()),
    }


def predict_identities(portraits: PortraitDataset, classifier: AttributeClassifier) -> Tensor:
    """Compute the classifier's identity embedding of each portrait.

    Args:
        portraits: Drawn portraits.
        classifier: Classifier with an identity embedding.

    Returns:
        Embeddings [n, width].
    """
    image_size = classifier.encoder.image_size
    photos = torch.stack([to_tensor(Image.fromarray(x), image_size) for x in portraits.images])
    return predict_in_batches(classifier, photos).identity


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("portraits", type=Path)
    parser.add_argument("--face-pack", type=Path, default=pretrained.FACE_PACK_DIR)
    parser.add_argument("--attribute-classifier", type=Path)
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[128],
        help="Sides of the detector's input in pixels.",
    )
    parser.add_argument(
        "--num-faceless", type=int, default=200, help="Images of each kind without a face."
    )
    arguments = parser.parse_args()
    portraits = PortraitDataset(arguments.portraits)
    embeddings_by_source: dict[str, Tensor] = {}
    for size in arguments.sizes:
        analyzer = FaceAnalyzer(arguments.face_pack, size)
        figures, embeddings = evaluate_detection(portraits, analyzer)
        embeddings_by_source.setdefault("face pack", embeddings)  # of the first size
        print(f"at {size}:", *(f"{name} {value:.4g}" for name, value in figures.items()), sep="  ")
        for kind, images in generate_faceless_images(portraits, arguments.num_faceless):
            num_false_alarms = sum(bool(analyzer.detect_faces(image)) for image in images)
            print(f"at {size}:  {kind}: {num_false_alarms} of {len(images)} with a face")
    if arguments.attribute_classifier:
        embeddings_by_source["classifier"] = predict_identities(
            portraits, AttributeClassifier.from_pretrained(arguments.attribute_classifier)
        )
    for name, vectors in embeddings_by_source.items():
        figures = evaluate_verification(vectors, portraits.config.portraits_per_identity)
        print(f"{name}:", *(f"{key} {value:.4g}" for key, value in figures.items()), sep="  ")


if __name__ == "__main__":
    main()
