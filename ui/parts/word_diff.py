"""What one text says differently from another, word by word: what is gone and what is new, for the page and for plain text."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from ui.parts.words import safe

LONG = 2000  # words; beyond, words that are everywhere are left out of the matching, which would take minutes
SAME, GONE, NEW = "same", "gone", "new"


def word_diff(before: str, after: str) -> list[tuple[str, str]]:
    """Return (same, gone or new; text) in reading order. What is same or new, put together, is `after` to the letter.

    Words are compared without the space around them: a line break instead of a space is no difference.
    """
    old, new = (re.findall(r"\s*\S+|\s+$", text) for text in (before, after))
    bare = [[word.strip() for word in words] for words in (old, new)]
    found: list[tuple[str, str]] = []
    matcher = SequenceMatcher(None, *bare, autojunk=max(len(old), len(new)) > LONG)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            found.append((SAME, "".join(new[c:d])))
            continue
        found += [(GONE, "".join(old[a:b]))] if b > a else []
        found += [(NEW, "".join(new[c:d]))] if d > c else []
    return found


def as_html(parts: list[tuple[str, str]]) -> str:
    """Return the difference with <del> and <ins>; both are told apart without colour, too."""
    marks = {SAME: "{}", GONE: "<del>{}</del>", NEW: "<ins>{}</ins>"}
    said = "".join(marks[kind].format(safe(text)) for kind, text in parts)
    return f'<p class="clm-diff">{said or "<i>nothing</i>"}</p>'


def as_text(parts: list[tuple[str, str]]) -> str:
    """Return the difference as `wdiff` writes it: [-gone-]{+new+}."""
    marks = {SAME: "{}", GONE: "[-{}-]", NEW: "{{+{}+}}"}
    return "".join(marks[kind].format(text) for kind, text in parts)
