"""Patterns of names in rules and conditions: an exact name, `prefix*`, or `*` and `?` anywhere.

`*` stands for any number of characters, including none and including `/`. `?` stands for one character. Nothing else
is special, and upper and lower case differ. The work is at most the product of the two lengths, for every pattern.
"""

from __future__ import annotations

import re
from collections.abc import Iterable


def matches(pattern: str, text: str) -> bool:
    """Whether the pattern matches the whole text."""
    in_pattern = in_text = 0
    star = star_end = -1  # the last star so far, and where the text that it stands for ends
    while in_text < len(text):
        if in_pattern < len(pattern) and pattern[in_pattern] == "*":
            star, star_end = in_pattern, in_text
            in_pattern += 1
        elif in_pattern < len(pattern) and pattern[in_pattern] in {"?", text[in_text]}:
            in_pattern, in_text = in_pattern + 1, in_text + 1
        elif star >= 0:
            star_end += 1
            in_pattern, in_text = star + 1, star_end
        else:
            return False
    return not pattern[in_pattern:].strip("*")


def any_matches(patterns: Iterable[str], text: str) -> bool:
    """Whether one of the patterns matches the text."""
    return any(matches(pattern, text) for pattern in patterns)


def literal_start(pattern: str) -> str:
    """What every text that matches begins with: the pattern up to its first wildcard."""
    return re.split(r"[*?]", pattern, maxsplit=1)[0]
