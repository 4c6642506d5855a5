"""Put the faults of ``named_faults.toml`` into a copy of the repository and run their tests.

    python -m benchmarks.mutation.named_faults [--folder runs/named-faults]

Prints which tests noticed each fault. Exits 1 where one went unnoticed.
"""

import argparse
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from benchmarks.mutation.copy_repository import copy_repository
from hyperlora.evaluation.tables import format_markdown_table

ROOT = Path(__file__).parents[2]
FAULTS_PATH = Path(__file__).with_name("named_faults.toml")


@dataclass(frozen=True)
class NamedFault:
    """A change of one line that tests must notice.

    Attributes:
        name: What is wrong.
        path: File, relative to the repository.
        line: Part of the file, whose first occurrence is replaced.
        fault: Text in its place.
        tests: Test file that must fail.
    """

    name: str
    path: str
    line: str
    fault: str
    tests: str

    def apply(self, text: str) -> str:
        """Return the source of the file with the fault.

        Raises:
            ValueError: if the line is not in it.
        """
        if self.line not in text:
            raise ValueError(f"{self.path} has no {self.line!r}: correct {FAULTS_PATH.name}")
        return text.replace(self.line, self.fault, 1)


def load_faults() -> list[NamedFault]:
    """Load the faults."""
    return [NamedFault(**fault) for fault in tomllib.loads(FAULTS_PATH.read_text())["fault"]]


def find_failed_test(folder: Path, fault: NamedFault) -> str | None:
    """Put a fault into a copy, run its tests, and take it out again.

    Args:
        folder: Copy of the repository.
        fault: The fault.

    Returns:
        Name of the first test that failed, or None.
    """
    path = folder / fault.path
    original = path.read_text()
    command = [sys.executable, "-m", "pytest", "-n0", "-x", "-p", "no:cacheprovider", "-rfE"]
    path.write_text(fault.apply(original))
    try:
        done = subprocess.run(
            [*command, fault.tests], cwd=folder, capture_output=True, text=True, check=False
        )
    finally:
        path.write_text(original)
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            return line.split()[1].partition("::")[2]
    return None


def main() -> None:
    """Parse the command line, run the tests of each fault, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "named-faults")
    folder = parser.parse_args().folder
    copy_repository(ROOT, folder, [])
    rows = []
    for fault in load_faults():
        test = find_failed_test(folder, fault)
        rows.append([fault.name, f"`{test}`" if test else "**unnoticed**"])
        print(": ".join(rows[-1]), file=sys.stderr, flush=True)
    print("\n".join(format_markdown_table(["fault", "first test that fails"], rows)))
    if any(test == "**unnoticed**" for _, test in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
