"""Put single faults into the mathematical core and count those that the quick tests notice.

    python -m benchmarks.mutation.run [PATTERN ...] [--folder runs/mutation] [--max-children 2]
        [--report-only]

Each mutant is one change: a sign, a number, an argument left out. ``[tool.mutmut]`` of
``pyproject.toml`` names the files and the tests. Results are kept in the folder: a further run
tests what is left, and the mutants of functions that changed. A pattern of mutants, such as
``hyperlora.diffusion.losses.*``, is tested anew.

Prints a table by file and writes ``report.md`` and ``survivors.txt`` there.
Exits 1 below the targets: 92 % of all mutants and 85 % of each file's.
"""

import argparse
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from benchmarks.mutation.copy_repository import copy_repository
from benchmarks.mutation.report import (
    EquivalenceRule,
    compute_scores,
    format_score_table,
    format_survivors,
    list_equivalent_rows,
    list_missed_targets,
    list_survivor_rows,
    read_mutants,
)
from hyperlora.evaluation.tables import format_markdown_table

ROOT = Path(__file__).parents[2]
RULES_PATH = Path(__file__).with_name("equivalent.toml")


def load_rules() -> list[EquivalenceRule]:
    """Load the rules of mutants that change nothing."""
    return [
        EquivalenceRule(**rule) for rule in tomllib.loads(RULES_PATH.read_text()).get("rule", [])
    ]


def run_mutmut(folder: Path, patterns: list[str], max_children: int) -> None:
    """Copy the repository and test the mutants of the copy.

    Args:
        folder: Folder of the copy and of the results.
        patterns: Mutants to test anew; empty: those without a result.
        max_children: Number of processes.
    """
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]
    copy_repository(ROOT, folder, config["only_mutate"])
    command = [str(Path(sys.executable).with_name("mutmut")), "run", *patterns]
    command += ["--max-children", str(max_children)]
    # a process of several threads cannot be forked
    subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def main() -> None:
    """Parse the command line, run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "mutation")
    parser.add_argument("--max-children", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    if not arguments.report_only:
        run_mutmut(arguments.folder, arguments.patterns, arguments.max_children)
    os.chdir(arguments.folder)  # mutmut reads its results in the working directory
    mutants, rules = read_mutants(Path()), load_rules()
    scores = compute_scores(mutants, rules)
    table = format_score_table(scores)
    survivors = format_markdown_table(
        ["function", "line", "becomes"], list_survivor_rows(mutants, rules)
    )
    equivalent = format_markdown_table(
        ["function", "mutants", "why nothing changes"], list_equivalent_rows(mutants, rules)
    )
    sections = ["## Scores", table, "## Survivors", "\n".join(survivors)]
    sections += ["## Mutants that change nothing", "\n".join(equivalent)]
    Path("report.md").write_text("\n\n".join(sections) + "\n")
    Path("survivors.txt").write_text(format_survivors(mutants, rules) + "\n")
    print(table)
    for status in ("not tested", "error"):
        if count := sum(mutant.status == status for mutant in mutants):
            print(f"{count} mutants: {status}")
    if missed := list_missed_targets(scores):
        print("\n".join(missed))
        raise SystemExit(1)


if __name__ == "__main__":
    main()
