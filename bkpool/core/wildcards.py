"""Patterns of names, as rules and conditions write them: exact, `prefix*`, or `*` and `?` anywhere.

`*` stands for any run of characters, also none and also with `/` in it; `?` for one; nothing else is special, and
case counts. The work is bounded by the product of the two lengths: no pattern makes it explode.
"""

from __future__ import annotations

from collections.abc import Iterable


def matches(pattern: str, text: str) -> bool:
    """Whether the pattern describes the whole text."""
    at = place = 0
    star = resume = -1  # the last star met, and how far its run reaches
    while place < len(text):
        if at < len(pattern) and pattern[at] == "*":
            star, resume = at, place
            at += 1
        elif at < len(pattern) and pattern[at] in {"?", text[place]}:
            at, place = at + 1, place + 1
        elif star >= 0:
            resume += 1
            at, place = star + 1, resume
        else:
            return False
    return not pattern[at:].strip("*")


def any_matches(patterns: Iterable[str], text: str) -> bool:
    """Whether one of the patterns describes the text."""
    return any(matches(pattern, text) for pattern in patterns)


def says_nothing(pattern: str) -> bool:
    """Whether every text of some length fits: such a pattern singles nobody out."""
    return not pattern.strip("*?")
