"""What one YAML text may cost: attacks on the reader, and that it reads what PyYAML reads."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bkpool.core.yaml_text import MOST_PLAIN_NODES, MOST_REPEATED_NODES, UnreadableYaml, load, load_all, load_plain

SECRET = "secret-in-the-text"
ROOT = Path(__file__).parents[2]


def lists(levels: int) -> str:
    return "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, levels))


def merges(levels: int) -> str:
    return "a0: &a0 {k: x}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, levels))


REPEATED = f"aliases that repeat more than {MOST_REPEATED_NODES} nodes"
NESTED = "it is nested in more than 100 levels"
NO_ALIASES = "aliases (*name) are not allowed here: write the value out"
LONG = "a number of more than 100 characters"
ATTACKS = {
    "lists that double": (lists(40), REPEATED),
    "merge keys that double": (merges(40), REPEATED),
    "an alias of what it is in": ("a: &a [*a]", "an alias inside of what it names"),
    "a merge key of what it is in": ("a: &a {<<: *a}", "an alias inside of what it names"),
    "levels": ("[" * 10_000, NESTED),
    "levels of blocks": ("".join(f"{' ' * n}a:\n" for n in range(1_000)), NESTED),
    "a number with the base 60": (f"a: {'1:' * 30_000}1", LONG),
    "a fraction with the base 60": (f"a: {'1:' * 30_000}1.5", LONG),
    "a long number": (f"a: 0x{'f' * 30_000}", LONG),
}


def test_a_key_that_is_there_twice_is_refused_with_its_line():
    with pytest.raises(UnreadableYaml, match=r"the key 'max' is there twice") as refused:
        load("scaling:\n  max: 9\n  max: 8\n")
    assert refused.value.line == 3
    with pytest.raises(UnreadableYaml, match=r"^it is not YAML$"):
        load_plain(f"{SECRET}: 1\n{SECRET}: 2\n", longest=1_000)
    merged = load(
        "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b}\n"
    )  # a field beside a merge key replaces one of it
    assert merged == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_for_what_it_would_cost_and_with_its_line(attack):
    """Without its limit it would take hours, or all of the memory, or end in another error."""
    text, problem = ATTACKS[attack]
    with pytest.raises(UnreadableYaml) as refused:
        load(text)
    assert refused.value.problem == problem
    assert refused.value.line is not None
    with pytest.raises(UnreadableYaml) as refused:
        load_plain(text, longest=1_000_000)
    assert refused.value.problem == (problem if problem in {NESTED, LONG} else NO_ALIASES)
    assert refused.value.line is not None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"a: &a {SECRET}\nb: *a", r"^aliases"),
        (f"b: *{SECRET}", r"^aliases"),
        (f"a: {{<<: {{{SECRET}: 1}}}}", r"^merge keys"),
        (f"a: {SECRET}\n---\nb: 1", "more than one document"),
        (f"a: !{SECRET} b", "it is not YAML"),
        (f"a: '{SECRET}", "it is not YAML"),
        (f"a: 2026-99-99 # {SECRET}", "it is not YAML"),
        (f"{SECRET}: {SECRET}: 1", "it is not YAML"),
        (f"a: !!bool {SECRET}", "it is not YAML"),
        (f"? [{SECRET}, {{}}]\n: 1", "it is not YAML"),
        (f"# {SECRET}\n[{'a,' * MOST_PLAIN_NODES}]", f"more than {MOST_PLAIN_NODES} nodes"),
        (f"a: {SECRET * 1000}", "longer than"),
    ],
)
def test_the_text_of_others_is_refused_without_quoting_it(text, says):
    with pytest.raises(UnreadableYaml, match=says) as refused:
        load_plain(text, longest=4096 if len(says) == len("longer than") else 1_000_000)
    assert SECRET not in f"{refused.value.problem}{refused.value.where}"
    assert refused.value.__cause__ is None


def test_aliases_may_repeat_what_is_useful_and_no_more():
    shared = f"shared: &a [{', '.join('x' * 99)}]\n"
    assert load(shared + "uses: [" + ", ".join(["*a"] * (MOST_REPEATED_NODES // 100)) + "]")
    with pytest.raises(UnreadableYaml, match="repeat more than"):
        load(shared + "uses: [" + ", ".join(["*a"] * (MOST_REPEATED_NODES // 100 + 1)) + "]")
    one = "a: &a {k: 1}\nb: {<<: *a}\n"
    assert load_all(f"{one}---\n{one}") == [{"a": {"k": 1}, "b": {"k": 1}}] * 2
    with pytest.raises(UnreadableYaml, match="more than one document"):
        load(f"{one}---\n{one}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@given(JSON)
def test_what_pyyaml_writes_is_read_as_it_was(data):
    text = yaml.safe_dump(data)
    assert load(text) == yaml.safe_load(text)
    if "&id" not in text:
        assert load_plain(text, longest=100_000) == yaml.safe_load(text)


@given(st.text(alphabet="ab:-[]{}&*<!'\"#\n ,|>?%1.", max_size=60))
def test_any_text_is_a_document_or_our_error(text):
    for read in (load_all, lambda text: load_plain(text, longest=1000)):
        with suppress(UnreadableYaml):
            read(text)


def test_no_other_module_reads_yaml():
    found = [
        str(path.relative_to(ROOT)) for path in (ROOT / "bkpool").rglob("*.py") if "import yaml\n" in path.read_text()
    ]
    assert found == ["bkpool/core/yaml_text.py"]
