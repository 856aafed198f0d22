"""Reads YAML so that no text costs more than its size: aliases, merge keys and long numbers have limits.

A key that a mapping has twice is an error: YAML forbids it, and PyYAML would drop the first value without a word.

All YAML of bkpool is read here. A few hundred bytes of YAML can stand for millions of nodes, because an alias repeats
what it names, and a merge key copies it. This module reads no file, and an error quotes nothing of a text that others
wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

MOST_REPEATED_NODES = 10_000
"""Nodes that the aliases of one text may repeat in all: keys, values, lists and mappings."""
MOST_PLAIN_NODES = 10_000
"""Nodes of a text without aliases that others wrote. PyYAML takes about 30 µs for each."""
NOT_YAML = "it is not YAML"
"""The problem of a text with secrets that is not YAML."""
MOST_LEVELS = 100
"""Lists and mappings inside of each other."""
_LONGEST_NUMBER = 100
"""Characters. A number with a base of 60 takes time that grows with the square of its length."""

_MERGE, _INT, _FLOAT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_NULL = "tag:yaml.org,2002:null"


class UnreadableYaml(ValueError):
    """A text that is not YAML, or has more in it than is allowed.

    Args:
        problem: What is wrong.
        line: The line, from 1; None if it is not known.
        column: The column, from 1; None if it is not known.
        quotes: Whether the problem may quote the text.
    """

    def __init__(
        self, problem: str, line: int | None = None, column: int | None = None, *, quotes: bool = False
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line
        self.column = column
        self.quotes = quotes

    @property
    def where(self) -> str:
        """The place, to be put after a file's name; empty if it is not known."""
        return "" if self.line is None else f", line {self.line}, column {self.column}"

    def without_quotes(self) -> UnreadableYaml:
        """The same error for a text with secrets: its problem quotes nothing."""
        return UnreadableYaml(NOT_YAML, self.line, self.column) if self.quotes else self


def load(text: str) -> object:
    """The one document of a text that the user of this machine wrote.

    Raises:
        UnreadableYaml: It is not YAML, has several documents, or its aliases repeat more than
            MOST_REPEATED_NODES nodes.
    """
    documents = load_all(text)
    if len(documents) > 1:
        raise UnreadableYaml("it has more than one document")
    return documents[0] if documents else None


def load_all(text: str) -> list[object]:
    """The same for a text with any number of documents. An empty document is None."""
    return list(_documents(_BoundedLoader, text))


def line_of(text: str, document: int, path: Sequence[str | int]) -> int | None:
    """The line, from 1, in which a key is written; None if it is not known, as for a key that a merge key copied.

    Args:
        text: What `load_all` has read without an error.
        document: The number of the document, from 0, without the empty ones.
        path: Keys and positions in lists that lead to the key.
    """
    nodes = [node for node in yaml.compose_all(text, _BoundedLoader) if node.tag != _NULL]
    node, line = nodes[document], None
    for part in path:
        if isinstance(part, int):
            node = node.value[part]
            continue
        found = [pair for pair in node.value if isinstance(pair, tuple) and pair[0].value == part]
        if not found:
            return None
        ((key, node),) = found
        line = key.start_mark.line + 1
    return line


def load_plain(text: str, *, longest: int) -> object:
    """The document of a text that somebody else wrote, such as an entry of a Secret.

    Args:
        text: The YAML.
        longest: The most characters that it may have.

    Raises:
        UnreadableYaml: It is longer, is not one document of YAML, has an alias or a merge key, or has more than
            MOST_PLAIN_NODES nodes. The error quotes nothing of it.
    """
    if len(text) > longest:
        raise UnreadableYaml(f"it is longer than {longest} characters")
    try:
        documents = list(_documents(_PlainLoader, text))
    except UnreadableYaml as error:
        raise error.without_quotes() from None
    if len(documents) > 1:
        raise UnreadableYaml("it has more than one document")
    return documents[0] if documents else None


def _not_allowed(problem: str, mark: Any) -> UnreadableYaml:
    return UnreadableYaml(problem, mark.line + 1, mark.column + 1)


def _documents(loader: type[_BoundedLoader], text: str) -> Iterator[object]:
    try:
        yield from yaml.load_all(text, loader)
    except UnreadableYaml:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "not YAML"
        raise UnreadableYaml(problem, *((mark.line + 1, mark.column + 1) if mark else ()), quotes=True) from None
    except (ValueError, ArithmeticError, RecursionError, AttributeError, LookupError, TypeError):
        # An impossible date, brackets nested too deeply, or an explicit tag that does not fit its value (!!bool x).
        raise UnreadableYaml("not YAML", quotes=True) from None


class _BoundedLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which counts nodes while it reads them."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._level = 0  # the nodes with those that aliases repeat
        self._repeated = 0
        self._sizes: dict[str, int] = {}  # of the nodes with an anchor, by its name

    def compose_document(self) -> Any:
        """The next document; anchors are valid in one document only."""
        self._sizes = {}
        return super().compose_document()

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node, unless there are too many."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            self._count_alias(event)
            return super().compose_node(parent, index)
        before = self._nodes
        self._nodes += 1
        self._level += 1
        self._check(event)
        node = super().compose_node(parent, index)
        self._level -= 1
        if event.anchor is not None:
            self._sizes[event.anchor] = self._nodes - before
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """The next mapping, unless it has a key twice. What a merge key adds is not there yet."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if (key.tag, key.value) in seen:
                    problem = f"the key {key.value!r} is there twice"
                    raise UnreadableYaml(problem, key.start_mark.line + 1, key.start_mark.column + 1, quotes=True)
                seen.add((key.tag, key.value))
        return node

    def _count_alias(self, alias: Any) -> None:
        if alias.anchor not in self.anchors:
            return  # PyYAML says so
        size = self._sizes.get(alias.anchor)
        if size is None:
            raise _not_allowed("an alias inside of what it names", alias.start_mark)
        self._nodes += size
        self._repeated += size
        if self._repeated > MOST_REPEATED_NODES:
            raise _not_allowed(f"aliases that repeat more than {MOST_REPEATED_NODES} nodes", alias.start_mark)

    def _check(self, event: Any) -> None:
        """Raises UnreadableYaml for a node that may not be there."""
        if self._level > MOST_LEVELS:
            raise _not_allowed(f"it is nested in more than {MOST_LEVELS} levels", event.start_mark)


class _PlainLoader(_BoundedLoader):
    """The same without aliases and merge keys, and with a limit for all nodes."""

    def _count_alias(self, alias: Any) -> None:
        raise _not_allowed("aliases (*name) are not allowed here: write the value out", alias.start_mark)

    def _check(self, event: Any) -> None:
        super()._check(event)
        if self._nodes > MOST_PLAIN_NODES:
            raise _not_allowed(f"it has more than {MOST_PLAIN_NODES} nodes", event.start_mark)

    def flatten_mapping(self, node: Any) -> None:
        """Called for each mapping before it is built: refuses merge keys."""
        for key, _ in node.value:
            if key.tag == _MERGE:
                raise _not_allowed("merge keys (<<) are not allowed here: write the fields out", key.start_mark)
        super().flatten_mapping(node)


def _int(loader: _BoundedLoader, node: Any) -> int:
    return yaml.SafeLoader.construct_yaml_int(loader, _short(node))


def _float(loader: _BoundedLoader, node: Any) -> float:
    return yaml.SafeLoader.construct_yaml_float(loader, _short(node))


def _short(node: Any) -> Any:
    if isinstance(node.value, str) and len(node.value) > _LONGEST_NUMBER:
        raise _not_allowed(f"a number of more than {_LONGEST_NUMBER} characters", node.start_mark)
    return node


_BoundedLoader.add_constructor(_INT, _int)
_BoundedLoader.add_constructor(_FLOAT, _float)
_PlainLoader.add_constructor(_INT, _int)
_PlainLoader.add_constructor(_FLOAT, _float)
