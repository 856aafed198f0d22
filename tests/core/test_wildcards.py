"""Patterns, compared with an equivalent regular expression."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bkpool.core.wildcards import any_matches, literal_start, matches

TEXTS = st.text(alphabet="ab/.*?[]\\\n", max_size=12)


def oracle(pattern: str) -> re.Pattern[str]:
    parts = {"*": ".*", "?": "."}
    return re.compile("".join(parts.get(char, re.escape(char)) for char in pattern), re.DOTALL)


@given(TEXTS, TEXTS)
@example("*a*b", "aab")
@example("a*b*a", "aba")
@example("*a?", "aaab")
@example("", "")
@example("**", "")
@example("[ab]", "a")
def test_only_star_and_question_mark_are_special(pattern, text):
    assert matches(pattern, text) == bool(oracle(pattern).fullmatch(text))


@given(st.lists(st.sampled_from("ab*?"), max_size=8).map("".join), st.data())
def test_a_text_made_from_a_pattern_matches_it(pattern, data):
    runs = {"*": TEXTS, "?": st.sampled_from("ab/\n")}
    text = "".join(data.draw(runs[char]) if char in runs else char for char in pattern)
    assert matches(pattern, text)


@pytest.mark.parametrize(
    ("pattern", "text", "fits"),
    [
        ("alice", "alice", True),
        ("alice", "Alice", False),
        ("alice", "alice2", False),
        ("alice*", "alice", True),
        ("repo:acme/*", "repo:acme/app:ref:refs/heads/main", True),
        ("repo:acme/*", "repo:acme-evil/app", False),
        ("repo:acme/*:ref:refs/heads/main", "repo:acme/app:ref:refs/heads/main", True),
        ("repo:acme/*:ref:refs/heads/main", "repo:acme/app:ref:refs/heads/main2", False),
        ("team-?", "team-a", True),
        ("team-?", "team-", False),
        ("team-?", "team-ab", False),
        ("*", "", True),
        ("?", "", False),
    ],
)
def test_examples_of_patterns(pattern, text, fits):
    assert matches(pattern, text) is fits
    assert any_matches(["no", pattern], text) is fits
    assert any_matches([], text) is False


def test_no_pattern_takes_exponential_time():
    assert not matches("*a" * 200 + "b", "a" * 2_000)


@pytest.mark.parametrize(
    ("pattern", "start"), [("*", ""), ("?a", ""), ("a*b*", "a"), ("a?*", "a"), ("a/b", "a/b"), ("", "")]
)
def test_the_literal_start_of_a_pattern(pattern, start):
    assert literal_start(pattern) == start
