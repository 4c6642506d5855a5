"""How often `hyperlora edit` takes a real pair for an unrelated one, and two different avatars for a pair.

python -m data_builder edits -o runs/data/edits-validation --split validation --groups 160
python benchmarks/doubts.py [runs/data/edits-validation]
"""

import sys

import numpy as np
import torch

from data_builder.avatars.pair_dataset import DrawnPairs
from hyperlora.pipelines.input_checks import UNRELATED, likeness


def main() -> None:
    drawn = DrawnPairs(sys.argv[1] if len(sys.argv) > 1 else "runs/data/edits-validation")
    pictures = torch.from_numpy(np.array(drawn.images)).permute(0, 3, 1, 2).float() / 255
    before, after = pictures[0::2], pictures[1::2]
    for name, others in (("own", after), ("another person's", after.roll(2, 0))):
        below = [likeness(a, b) < UNRELATED for a, b in zip(before, others, strict=True)]
        print(f"{name} picture after: {sum(below) / len(below):.1%} of {len(below)} called unrelated")


if __name__ == "__main__":
    main()
