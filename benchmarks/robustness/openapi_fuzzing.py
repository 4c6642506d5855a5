"""Schemathesis over the whole OpenAPI of a real server process, with all its checks.

    python -m benchmarks.robustness.openapi_fuzzing [--num-cases 2000] [--seed 0]

Prints a table by operation (cases, answers) and every failure by its check, and exits 1 after a
failure. The check positive_data_acceptance is left out, since a schema cannot express that random
bytes are no photo.
"""

import argparse
from collections import Counter
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.console import Console
from rich.table import Table
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import positive_data_acceptance

from benchmarks.service_process import API_KEY, start_server, write_key_file

CASES_PER_PASS = 25
"""Cases of one operation at a time; an operation with few parameters has fewer."""


class FuzzReport:
    """Answers by operation and failures by check."""

    def __init__(self) -> None:
        self.answers: dict[str, Counter[int]] = {}
        self.failures: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    @property
    def num_cases(self) -> int:
        """Number of cases that were sent."""
        return sum(counter.total() for counter in self.answers.values())

    def run_case(self, name: str, case: Any) -> None:
        """Send a case and run every check on its answer.

        Args:
            name: Name of the operation.
            case: Case of Schemathesis.
        """
        headers = {"Authorization": f"Bearer {API_KEY}"}
        _limit_cost(case.body)
        response = case.call(headers=headers, timeout=180)
        self.answers.setdefault(name, Counter())[response.status_code] += 1
        try:
            case.validate_response(
                response, headers=headers, excluded_checks=[positive_data_acceptance]
            )
        except FailureGroup as group:
            for failure in group.exceptions:
                self.failures[type(failure).__name__] += 1
                self.examples.setdefault(type(failure).__name__, f"{name}: {failure}")


def _limit_cost(body: Any) -> None:
    """Limit the steps of refinement and sampling, which take long."""
    if isinstance(body, dict):
        if "refine_steps" in body:
            body["refine_steps"] = 0
        num_steps = body.get("num_inference_steps")
        if isinstance(num_steps, int | float):
            body |= {"num_inference_steps": min(num_steps, 2), "width": 64, "height": 64}


def fuzz_operation(report: FuzzReport, operation: Any, rng_seed: int) -> None:
    """Run ``CASES_PER_PASS`` cases of an operation, or as many as it has.

    Args:
        report: Receives the answers.
        operation: Operation of the schema.
        rng_seed: Seed of the cases.
    """

    @seed(rng_seed)
    @settings(
        max_examples=CASES_PER_PASS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=[Phase.explicit, Phase.generate],
    )
    @given(case=operation.as_strategy())
    def send(case: Any) -> None:
        report.run_case(operation.label, case)

    send()


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    report, rng_seed = FuzzReport(), arguments.seed
    with write_key_file() as key_file, start_server("--api-key-file", key_file) as (url, _):
        schema = schemathesis.openapi.from_url(url + "/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        while report.num_cases < arguments.num_cases:
            for operation in operations:
                fuzz_operation(report, operation, rng_seed)
            rng_seed += 1
    table = Table("operation", "cases", "answers")
    for name, answers in report.answers.items():
        counts = ", ".join(f"{status}: {count}" for status, count in sorted(answers.items()))
        table.add_row(name, str(answers.total()), counts)
    Console(width=120).print(table)
    num_errors = sum(
        count
        for answers in report.answers.values()
        for status, count in answers.items()
        if status >= 500
    )
    print(
        f"{report.num_cases} cases, {num_errors} server errors, "
        f"{report.failures.total()} failed checks {dict(report.failures)}"
    )
    for example in report.examples.values():
        print(example)
    raise SystemExit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
