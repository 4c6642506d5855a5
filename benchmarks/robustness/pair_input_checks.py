"""How often `hyperlora edit` takes a real pair for an unrelated one, and two different avatars for a pair.

python -m data_builder edits -o runs/data/edits-validation --split validation --groups 160
python benchmarks/doubts.py [runs/data/edits-validation]
"""

import sys

import numpy as np
import torch

from data_builder.avatars.pair_dataset import PairDataset
from hyperlora.pipelines.input_checks import SIMILARITY_THRESHOLD, compute_structural_similarity


def main() -> None:
    dataset = PairDataset(sys.argv[1] if len(sys.argv) > 1 else "runs/data/edits-validation")
    images = torch.from_numpy(np.array(dataset.images)).permute(0, 3, 1, 2).float() / 255
    before, after = images[0::2], images[1::2]
    for name, others in (("own", after), ("another person's", after.roll(2, 0))):
        is_rejected = [
            compute_structural_similarity(a, b) < SIMILARITY_THRESHOLD
            for a, b in zip(before, others, strict=True)
        ]
        print(
            f"{name} picture after: {sum(is_rejected) / len(is_rejected):.1%} of {len(is_rejected)} called unrelated"
        )


if __name__ == "__main__":
    main()
