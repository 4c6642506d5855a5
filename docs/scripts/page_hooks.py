"""Hooks of MkDocs: a number, its error and its unit stay on one line."""

import re

NUMBER_AND_SIGN = re.compile(r"(?<=\d\*\*) (?=±)|(?<=\d) (?=[±×%])|(?<=±) (?=\d)|(?<=[≥≤]) (?=\d)")
CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the spaces inside a number by non-breaking ones, except in code.

    Args:
        markdown: Text of a page.

    Returns:
        The text to render.
    """
    parts = CODE.split(markdown)
    parts[::2] = [NUMBER_AND_SIGN.sub("\N{NO-BREAK SPACE}", text) for text in parts[::2]]
    return "".join(parts)
