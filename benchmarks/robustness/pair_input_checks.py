"""Check for unrelated before/after images: false alarms on real pairs, detection rate on shuffled
pairs.

data-builder draw-pairs -o runs/data/edits-validation --split validation --num-edits 160
python -m benchmarks.robustness.pair_input_checks [runs/data/edits-validation]
"""

import argparse
from pathlib import Path

from data_builder.avatars.pair_dataset import PairDataset
from hyperlora.data.images import array_to_tensor
from hyperlora.pipelines.input_checks import SIMILARITY_THRESHOLD, compute_structural_similarity


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


if __name__ == "__main__":
    main()
