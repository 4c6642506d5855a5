"""schemathesis over the whole OpenAPI of a real server process, all its checks.

    python benchmarks/fuzzing.py [--cases 2000] [--seed 0]

Prints a table by operation (cases, answers) and every failure by its check, and exits 1 if there is one. One check is
left out, positive_data_acceptance: that random bytes are no photo, no schema says.
"""

import argparse
import tempfile
from collections import Counter
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.console import Console
from rich.table import Table
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import server

KEY = "a-right-key-0123456"
CASES_PER_PASS = 25  # cases of one operation at a time: some have few parameters, and so few cases


class FuzzReport:
    """Answers by operation and failures by check."""

    def __init__(self) -> None:
        self.answers: dict[str, Counter[int]] = {}
        self.failures: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    @property
    def num_cases(self) -> int:
        return sum(counter.total() for counter in self.answers.values())

    def run_case(self, name: str, case: Any) -> None:
        """Send a case and run every check on its answer."""
        headers = {"Authorization": f"Bearer {KEY}"}
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
    """What takes long and is no news: steps of refining and of drawing."""
    if isinstance(body, dict):
        if "refine" in body:
            body["refine"] = 0
        if isinstance(body.get("steps"), int | float):
            body |= {"steps": min(body["steps"], 2), "width": 64, "height": 64}


def fuzz_operation(report: FuzzReport, operation: Any, rng_seed: int) -> None:
    """``CASES_PER_PASS`` cases of an operation, or as many as it has."""

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    report, rng_seed = FuzzReport(), arguments.seed
    with tempfile.NamedTemporaryFile("w") as keys:
        keys.write(KEY)
        keys.flush()
        with server("--keys", keys.name) as (url, _):
            api = schemathesis.openapi.from_url(url + "/openapi.json")
            operations = [result.ok() for result in api.get_all_operations()]
            while report.num_cases < arguments.cases:
                for operation in operations:
                    fuzz_operation(report, operation, rng_seed)
                rng_seed += 1
    table = Table("operation", "cases", "answers")
    for name, answers in report.answers.items():
        table.add_row(
            name, str(answers.total()), ", ".join(f"{k}: {n}" for k, n in sorted(answers.items()))
        )
    Console(width=120).print(table)
    errors = sum(
        n for counter in report.answers.values() for status, n in counter.items() if status >= 500
    )
    print(
        f"{report.num_cases} cases, {errors} server errors, {report.failures.total()} failures {dict(report.failures)}"
    )
    for example in report.examples.values():
        print(example)
    raise SystemExit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
