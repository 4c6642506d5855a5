"""``PatternTable``: PEFT's ``rank_pattern`` and ``alpha_pattern``, matched in time for any file.

Most patterns are names of modules, one for each module of a file. They stand in an index by their
length, so that finding one takes no longer with more of them. The others are regular expressions.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Final

import regex

from hyperlora.errors import InvalidLoraFileError

MAX_PATTERNS: Final = 5000
"""Patterns of a file together; few bases have more modules."""
MAX_PATTERN_LENGTH: Final = 500
MAX_EXPRESSIONS: Final = 100
"""Patterns of a file together that are more than a module's name."""
_NAME_PATTERN: Final = re.compile(r"\^?[\w.]+\$?", re.ASCII)
_FUZZY_PATTERN: Final = re.compile(r"\{[^\d,}]")
"""What ``regex`` takes for approximate matching, and ``re`` for plain text."""


def check_patterns(patterns: Sequence[str], file_name: str) -> None:
    """Check number and length of all patterns of a file, before any is compiled.

    Args:
        patterns: The patterns of all tables of the file.
        file_name: The name of the file in error messages.

    Raises:
        InvalidLoraFileError: There are too many, or one is too long.
    """
    longest = max(map(len, patterns), default=0)
    num_expressions = 0
    if len(patterns) <= MAX_PATTERNS and longest <= MAX_PATTERN_LENGTH:
        num_expressions = sum(not _NAME_PATTERN.fullmatch(text) for text in patterns)
        if num_expressions <= MAX_EXPRESSIONS:
            return
    expressions = f", {num_expressions} of them regular expressions" if num_expressions else ""
    raise InvalidLoraFileError(
        f"{file_name} has {len(patterns)} patterns of up to {longest} characters in its "
        f"rank_pattern and alpha_pattern{expressions}: at most {MAX_PATTERNS}, "
        f"{MAX_PATTERN_LENGTH} and {MAX_EXPRESSIONS} are read"
    )


class PatternTable:
    """Patterns in PEFT's order; the first that matches the end of a path counts.

    Args:
        patterns: The patterns, which ``check_patterns`` accepted.
        field: Where they stand, in error messages.
        file_name: The name of the file in error messages.
    """

    def __init__(self, patterns: Iterable[str], field: str, file_name: str) -> None:
        self.patterns, self.field, self.file_name = tuple(patterns), field, file_name
        self._expressions: list[tuple[int, regex.Pattern[str]]] = []
        # by length: places of dots, which match any character; then the name and its number
        self._names: dict[int, dict[tuple[int, ...], dict[str, int]]] = defaultdict(dict)
        self._whole_names: dict[int, dict[tuple[int, ...], dict[str, int]]] = defaultdict(dict)
        for number, text in enumerate(self.patterns):
            if _NAME_PATTERN.fullmatch(text):
                name = text.removeprefix("^").removesuffix("$")
                names = self._whole_names if text.startswith("^") else self._names
                places = tuple(i for i, letter in enumerate(name) if letter == ".")
                names[len(name)].setdefault(places, {}).setdefault(name, number)
            else:
                self._expressions.append((number, self._compile(text)))

    def _compile(self, text: str) -> "regex.Pattern[str]":
        """The expression of ``peft.utils.other.get_pattern_key``, which can be stopped."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of syntax that the two modules read differently
                re.compile(text)
                if _FUZZY_PATTERN.search(text):
                    raise ValueError("braces without numbers")
                return regex.compile(rf"(.*\.)?({text})$")
        except (re.error, regex.error, Warning, ValueError, RecursionError, OverflowError) as error:
            raise InvalidLoraFileError(
                f"{self.file_name} has the pattern {text[:80]!r} in its {self.field}, "
                f"which is no regular expression: {str(error)[:80]}"
            ) from error

    def find(self, path: str, deadline: float) -> str | None:
        """Find the first pattern that matches a path.

        Args:
            path: Path of a module.
            deadline: When to give up, by ``monotonic``.

        Returns:
            The pattern; None if none does.

        Raises:
            InvalidLoraFileError: The deadline is over.
        """
        number = self._find_name(path)
        text = "" if number is None else self.patterns[number]
        try:
            for expression_number, pattern in self._expressions:
                if number is not None and expression_number > number:
                    break
                text = self.patterns[expression_number]
                remaining_s = deadline - monotonic()
                if remaining_s <= 0:
                    raise TimeoutError
                if pattern.match(path, timeout=remaining_s) is not None:
                    return text
            if monotonic() > deadline:
                raise TimeoutError
        except TimeoutError as error:
            raise InvalidLoraFileError(
                f"{self.file_name} has a {self.field} that takes longer than a file may to match, "
                f"at {text[:80]!r}: name the modules instead"
            ) from error
        return None if number is None else self.patterns[number]

    def _find_name(self, path: str) -> int | None:
        """The number of the first name that is the path or its end after a dot."""
        starts = [0, *(i + 1 for i, letter in enumerate(path) if letter == ".")]
        tables = [(path, self._whole_names), *((path[start:], self._names) for start in starts)]
        numbers: list[int] = []
        for end, names in tables:
            for places, numbers_by_name in names.get(len(end), {}).items():
                number = numbers_by_name.get(_replace_with_dots(end, places))
                numbers += [] if number is None else [number]
        return min(numbers, default=None)


def _replace_with_dots(text: str, places: Sequence[int]) -> str:
    """Replace the characters at some places by dots."""
    letters = list(text)
    for place in places:
        letters[place] = "."
    return "".join(letters)
