"""What one YAML text may cost: attacks on the reader, and that it reads what PyYAML reads."""

from __future__ import annotations

import time
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


ATTACKS = {
    "lists that double": lists(40),
    "merge keys that double": merges(40),
    "an alias of what it is in": "a: &a [*a]",
    "a merge key of what it is in": "a: &a {<<: *a}",
    "levels": "[" * 50_000,
    "levels of blocks": "".join(f"{' ' * n}a:\n" for n in range(1_000)),
    "a number with the base 60": f"a: {'1:' * 30_000}1",
    "a fraction with the base 60": f"a: {'1:' * 30_000}1.5",
    "a long number": f"a: 0x{'f' * 30_000}",
}


@pytest.mark.parametrize("read", [load, lambda text: load_plain(text, longest=1_000_000)])
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_with_its_line_and_at_once(attack, read):
    began = time.process_time()
    with pytest.raises(UnreadableYaml) as refused:
        read(ATTACKS[attack])
    assert refused.value.line is not None
    assert time.process_time() - began < 2


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
