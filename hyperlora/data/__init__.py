"""What comes in: pictures read safely, the subjects a folder of pictures holds, datasets of LoRAs."""

from hyperlora.data.images import image_files, read_image, sha256_of, to_image, to_tensor
from hyperlora.data.loras import LoraDataset
from hyperlora.data.pairs import HubPairs, ImagePair, named_pairs, pairs_in
from hyperlora.data.subjects import Subject, subjects_in

__all__ = [
    "HubPairs",
    "ImagePair",
    "LoraDataset",
    "Subject",
    "image_files",
    "named_pairs",
    "pairs_in",
    "read_image",
    "sha256_of",
    "subjects_in",
    "to_image",
    "to_tensor",
]
