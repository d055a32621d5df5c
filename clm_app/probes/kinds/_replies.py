"""Read what a reply says: the same words as another, a number in it, a pattern in it, JSON.

Nothing is guessed: what cannot be read is None, and a kind counts it as wrong.
"""

from __future__ import annotations

import json
import math

import regex  # not `re`: it can stop a pattern that never ends

from clm_app.errors import BadData
from clm_app.judging.wording import words

PATTERN_S = 1.0  # seconds for one pattern on one reply; a sane one needs microseconds
# Not a piece of a version (1.2.3), a word (v2) or an amount written the other way round (1234,5): those are unreadable.
NUMBER = regex.compile(
    r"(?<![\w.]|\d,)[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?(?![.,]?\d)"
)


def normalised(text: str) -> str:
    """Return the words in lower case without the marks around them, one space between; marks alone stay as they are."""
    return " ".join(words(text)) or text.strip()


def number_in(text: str, decimal: str = "point", which: str = "last") -> float | None:
    """Return a number that stands in a text; None where there is none, or none that a float can hold.

    decimal: point reads 1,234.5 and comma 1.234,5. which: first, last, or only (None where there are several).
    """
    if decimal == "comma":
        text = text.translate(str.maketrans(",.", ".,"))
    found = [match.group() for match in NUMBER.finditer(text)]
    if not found or (which == "only" and len(found) > 1):
        return None
    value = float(found[0 if which == "first" else -1].replace(",", "").replace("\u2212", "-"))
    return value if math.isfinite(value) else None


def compiled(pattern: str, capitals: bool = False) -> regex.Pattern:
    """Return a pattern that looks at letters alone, or at capitals too.

    Raises:
        BadData: it is no regular expression.
    """
    try:
        return regex.compile(pattern, 0 if capitals else regex.IGNORECASE)
    except regex.error as err:
        raise BadData(
            f"{pattern!r} is no regular expression ({err}). Correct it; put \\ before a mark that is meant literally."
        ) from err


def finds(pattern: regex.Pattern, text: str, whole: bool = False) -> bool:
    """Return whether a pattern stands in the text, or is the whole text.

    Raises:
        BadData: it takes more than PATTERN_S on this text.
    """
    try:
        return (pattern.fullmatch if whole else pattern.search)(text, timeout=PATTERN_S) is not None
    except TimeoutError as err:
        raise BadData(
            f"The pattern {pattern.pattern!r} needs more than {PATTERN_S:g} s on one reply. "
            "Write it without a repeat inside a repeat."
        ) from err


def json_in(text: str, fenced: bool = False) -> tuple[bool, object]:
    """Return (is the whole text one JSON value, that value); fenced: a ```json block around it is let through."""
    text = text.strip()
    if fenced and (match := regex.fullmatch(r"```(?:json)?\s*\n(.*)\n\s*```", text, regex.DOTALL)):
        text = match.group(1)
    try:
        return True, json.loads(text, parse_constant=_refused)
    except (ValueError, RecursionError):  # RecursionError: thousands of brackets, which nobody could use either
        return False, None


def _refused(name: str) -> None:
    raise ValueError(f"{name} is not JSON (RFC 8259, section 6)")
