"""Each word has one meaning: old names do not come back, and no two modules have a class of the same name."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from bkpool.core.errors import BkpoolError

pytestmark = pytest.mark.any_python

ROOT = Path(__file__).parents[1]
ERRORS = {error.__name__ for error in (BkpoolError, *BkpoolError.__subclasses__())}
CODE = ("bkpool", "bench", "e2e", "tests", "scripts")

OLD_NAMES = {
    "Alarm": "SocketErrorWatcher",
    "Allocation": "Lease",
    "Claims": "Allocator",
    "Door": "LoopBridge",
    "Exchange": "DuplexRelay",
    "Farewell": "RefusalResponder",
    "Gate": "LoopShard",
    "Kept": "Reflector",
    "Leg": "SocketEndpoint",
    "Life": "ConnectionMachine",
    "Line": "WaitQueue",
    "Patience": "HoldBudget for connections, StartDeadline for pods",
    "Porter": "Acceptor",
    "Todo": "Commands",
    "_mourn": "a name such as watch_exit",
    "bereaved": "a name that says that the worker closed first",
    "deaf": "write_closed",
    "deafen": "close_write",
    "farewell": "refusal_responder",
    "guests": "pending",
    "heard": "bytes_in",
    "heard_end": "a name that says that the peer ended its direction",
    "lead_home": "a name with owner_loop",
    "met_a_stranger": "wrong_peer",
    "parted": "worker_closed_sibling",
    "said": "bytes_out",
    "said_end": "write_eof",
    "shaken": "handshake_done",
    "unfit": "certificate_rejected",
}
"""Old identifiers, each with the name that replaced it."""

OLD_NAMES_IN_PRODUCT = {
    "Do": "Command",
    "End": "PeerStream",
    "PATIENCE": "a name that ends in _TIMEOUT",
    "_PATIENCE": "a name that ends in _TIMEOUT",
    "patience": "timeout",
    "way": "routable_endpoint",
}
"""The same for words that have another use in tests."""

OLD_MODULES = {
    "bkpool/allocation/claims.py",
    "bkpool/allocation/line.py",
    "bkpool/appliance/parts.py",
    "bkpool/appliance/settings.py",
    "bkpool/gateway/alarm.py",
    "bkpool/identity/bearers.py",
    "bkpool/identity/entries.py",
    "bkpool/identity/keys.py",
    "bkpool/identity/local.py",
    "bkpool/pki/keep.py",
    "bkpool/toolchain/chain.py",
    "bkpool/workers/pods/kept.py",
}


@cache
def text(folder: str) -> dict[str, str]:
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / folder).rglob("*.py"))}


@cache
def trees(folder: str) -> dict[str, ast.Module]:
    return {path: ast.parse(content) for path, content in text(folder).items()}


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that the code defines or uses, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, node.lineno
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield name, node.lineno
            case ast.keyword(arg=str(name)):
                yield name, node.lineno
            case ast.alias(name=name, asname=other):
                yield from ((word, node.lineno) for word in (name.rpartition(".")[2], other) if word)


@pytest.mark.parametrize(
    ("folders", "names"), [(CODE, OLD_NAMES), (("bkpool",), OLD_NAMES_IN_PRODUCT)], ids=["everywhere", "product"]
)
def test_old_names_do_not_come_back(folders, names):
    word = re.compile(rf"\b(?:{'|'.join(names)})\b")
    found = [
        f"{path}:{line}: {name}; write {names[name]}"
        for folder in folders
        for path, content in text(folder).items()
        if word.search(content)  # to parse every file takes seconds
        for name, line in identifiers(ast.parse(content))
        if name in names
    ]
    assert not found, "\n".join(found)


def test_old_modules_do_not_come_back():
    assert not [path for path in OLD_MODULES if (ROOT / path).exists()]


def test_the_gateway_has_no_tenants():
    """A tenant is the owner of a cache. The gateway knows connections and leases only."""
    found = [
        f"{path}:{line}"
        for path, tree in trees("bkpool").items()
        if path.startswith("bkpool/gateway/")
        for name, line in identifiers(tree)
        if "tenant" in name.lower()
    ]
    assert not found


def test_no_two_modules_have_a_class_of_the_same_name():
    places: dict[str, list[str]] = defaultdict(list)
    for path, tree in trees("bkpool").items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(path)
    assert not {name: paths for name, paths in places.items() if len(paths) > 1}


def test_settings_are_called_settings_and_what_a_run_was_given_options():
    """`Configuration` was the class of all settings, and `Settings` that of what a run was given."""
    right = {"Settings": {"settings"}, "RunOptions": {"options", "run_options"}}
    found = [
        f"{path}:{node.lineno}: {node.arg}: {node.annotation.id}"
        for path, tree in trees("bkpool").items()
        for node in ast.walk(tree)
        if isinstance(node, ast.arg) and isinstance(node.annotation, ast.Name) and node.annotation.id in right
        if node.arg not in right[node.annotation.id]
    ]
    found += [
        f"{path}:{node.lineno}: class Configuration"
        for path, tree in trees("bkpool").items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name == "Configuration"
    ]
    assert not found


def test_no_module_exceeds_400_lines_and_no_function_60():
    long = [f"{path}: {len(_lines(path))} lines" for path in trees("bkpool") if len(_lines(path)) > 400]
    for path, tree in trees("bkpool").items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > 60:
                    long.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    assert not long, "\n".join(long)


def test_messages_of_errors_begin_with_a_lower_case_letter():
    """They follow "error: ". A name keeps its capital."""
    found = [
        f"{path}:{node.lineno}: {start}"
        for path, tree in trees("bkpool").items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args
        if re.match(r"(?:An?|All|Another|It|No|One|The|There|This) ", start := _beginning(node.args[0]))
    ]
    assert not found, "\n".join(found)


def test_words_are_not_contracted():
    kubernetes = "didn't have free ports"  # what a scheduler reports
    contracted = re.compile(r"n't\b")
    assert not [
        path for path, content in text("bkpool").items() if contracted.search(content.replace(kubernetes, ""))
    ]


def _beginning(message: ast.expr) -> str:
    if isinstance(message, ast.JoinedStr) and message.values:
        message = message.values[0]
    return message.value if isinstance(message, ast.Constant) and isinstance(message.value, str) else ""


def test_every_module_has_a_docstring():
    silent = [path for path, tree in trees("bkpool").items() if not _generated(path) and not ast.get_docstring(tree)]
    assert not [path for path in silent if _lines(path)]


def _generated(path: str) -> bool:
    return path.endswith(("_pb2.py", "_pb2_grpc.py", "_grpc.py"))


def _lines(path: str) -> list[str]:
    return (ROOT / path).read_text().splitlines()
