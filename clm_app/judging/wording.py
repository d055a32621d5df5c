"""How much of a right answer stands in a given one, word by word, where exact match asks too much."""

from __future__ import annotations

from collections import Counter


def words(text: str) -> list[str]:
    """Return the words in lower case without the marks around them; a sign or a point inside a number stays."""
    return [word for found in text.lower().split() if (word := found.strip(".,;:!?()[]{}\"'`*_"))]


def token_f1(said: str, right: str) -> float:
    """Return the harmonic mean of precision and recall over words, 0..1 (Rajpurkar et al. 2016, arXiv:1606.05250)."""
    one, other = words(said), words(right)
    shared = (Counter(one) & Counter(other)).total()
    return 2 * shared / (len(one) + len(other)) if shared else 0.0
