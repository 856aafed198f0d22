"""The pages of the repository agree with each other and with the code.

Only cheap checks of names: links, anchors, files, metrics, log events and environment variables.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from bkpool.core.documents import read_documents
from bkpool.core.gateway_heartbeat import GatewayHeartbeat
from bkpool.core.worker import Worker

pytestmark = pytest.mark.any_python

ROOT = Path(__file__).resolve().parents[1]
PAGE = re.compile(r"\b(docs/[\w/.-]+\.(?:md|yaml|json|svg))\b")
SETTINGS = ROOT / "docs" / "configuration.md"
"""Generated from the code; tests/settings/test_reference.py compares them."""
WRITTEN = (Worker, GatewayHeartbeat)
"""Kinds that only bkpool writes, so no file of a user has them."""
HISTORY = {"CHANGELOG.md", "docs/decisions"}
"""Pages that also name what was there before."""


@cache
def files() -> tuple[Path, ...]:
    """Every file that git tracks or would track, and that still exists."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return tuple(path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file())


@cache
def text(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        return ""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def pages() -> list[Path]:
    return [path for path in files() if path.suffix == ".md"]


def current_pages() -> list[Path]:
    return [path for path in pages() if not name(path).startswith(tuple(HISTORY))]


def test_the_list_of_decisions_has_all_of_them_in_order():
    directory = ROOT / "docs" / "decisions"
    there = sorted(path.name for path in files() if path.parent == directory and path.name[:4].isdigit())
    listed = re.findall(r"^\| \[\d{4}\]\(([\w-]+\.md)\)", text(directory / "README.md"), flags=re.MULTILINE)
    assert listed == there


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text(path), flags=re.MULTILINE | re.DOTALL)


@cache
def source() -> str:
    """The code, the scripts and what they ship; not the pages."""
    kinds = {".py", ".sh", ".js", ".yml", ".yaml", ".json", ".go", ".toml", ""}
    return "\n".join(
        text(path)
        for path in files()
        if path.suffix in kinds and not name(path).startswith("docs/") and path != Path(__file__)
    )


def anchors(path: Path) -> set[str]:
    """What `#…` may name in a page: explicit anchors, and headings as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?)\s*$", prose(path), flags=re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text(path)))


def test_no_file_refers_to_a_page_outside_the_repository():
    word = "DESI" + "GN"
    assert [name(path) for path in files() if re.search(rf"\b{word}\b|(?i:\bissue #?\d)", text(path))] == []


@pytest.mark.parametrize("page", pages(), ids=name)
def test_every_relative_link_leads_somewhere(page: Path):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        where = (page.parent / file).resolve() if file else page
        if not where.exists() or (anchor and anchor not in anchors(where)):
            broken.append(target)
    assert broken == []


def test_every_anchor_that_code_and_pages_name_exists():
    broken = []
    for path in files():
        for page, anchor in re.findall(r"\b(docs/[\w/.-]+\.md)#([\w-]+)", text(path)):
            where = ROOT / page
            if not where.exists() or anchor not in anchors(where):
                broken.append(f"{name(path)}: {page}#{anchor}")
    assert broken == []


def test_every_page_that_code_names_exists():
    named = {(name(path), page) for path in files() for page in re.findall(PAGE, text(path))}
    assert sorted(where for where in named if not (ROOT / where[1]).exists()) == []


@pytest.mark.parametrize("page", current_pages(), ids=name)
def test_every_file_that_a_page_names_exists(page: Path):
    tops = "bkpool|tests|e2e|bench|scripts|docs|examples|actions"
    named = re.findall(rf"`((?:{tops})/[\w./-]+)`", prose(page))
    assert [file for file in named if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("page", current_pages(), ids=name)
def test_every_metric_of_a_page_is_in_the_code(page: Path):
    metrics = set(
        re.findall(r"\b(?:buildkit_(?:gateway|api|controller|worker|pool)|bkpool)_[a-z_]+[a-z]\b", text(page))
    )
    stems = {re.sub(r"_(total|count|sum|bucket)$", "", metric) for metric in metrics}
    assert sorted(stem for stem in stems if stem not in source()) == []


@pytest.mark.parametrize("page", [page for page in current_pages() if page != SETTINGS], ids=name)
def test_every_variable_of_a_page_is_in_the_code(page: Path):
    known = source() + text(SETTINGS)
    variables = set(re.findall(r"\b(?:BKPOOL|BKCTL)_[A-Z_]+[A-Z]\b", text(page)))
    assert sorted(variable for variable in variables if variable not in known) == []


@pytest.mark.parametrize("page", current_pages(), ids=name)
def test_every_log_event_of_a_page_is_in_the_code(page: Path):
    events = set(
        re.findall(r"`((?:lease|connection|gateway|loop|worker|pool|slot|reflector)\.[a-z_-]+)`", prose(page))
    )
    files_and_fields = {event for event in events if event.endswith((".py", ".md", ".yaml"))}
    wrong = [event for event in events - files_and_fields if f'"{event}"' not in source() and not _is_field(event)]
    assert sorted(wrong) == []


def test_every_object_that_a_page_or_an_example_shows_can_be_read():
    blocks = [
        (name(page), block)
        for page in current_pages()
        for block in re.findall(r"^```yaml\n(.*?)^```", text(page), flags=re.MULTILINE | re.DOTALL)
    ]
    blocks += [(name(path), text(path)) for path in files() if path.match("examples/*.yaml")]
    shown = [(where, block) for where, block in blocks if "kind: BuildKit" in block]
    written = [(where, kind, block) for where, block in shown for kind in WRITTEN if f"kind: {kind.KIND}\n" in block]
    assert len(shown) > 5
    assert {kind for _, kind, _ in written} == set(WRITTEN)
    for where, kind, block in written:
        obj = kind.model_validate(yaml.safe_load(block))
        assert [*obj.metadata.model_extra, *obj.spec.model_extra, *obj.status.model_extra] == [], where
    for where, block in shown:
        if not any(block is other for _, _, other in written):
            read_documents(block, source=where)


def test_the_picture_of_the_rooms_shows_their_imports():
    imports = _imports_between_rooms()
    arrows = _arrows_between_rooms()
    assert sorted(arrow for arrow in arrows if arrow not in imports) == []
    reached = _reached_along(arrows)
    assert sorted(one for one in imports if one not in reached) == []
    superfluous = [arrow for arrow in arrows if arrow in _reached_along(arrows - {arrow})]
    assert sorted(superfluous) == []


def _imports_between_rooms() -> set[tuple[str, str]]:
    """Pairs of rooms: the first one imports the second one."""
    rooms = {path.parent.name for path in (ROOT / "bkpool").glob("*/__init__.py")}
    found = set()
    for path in files():
        room = name(path).split("/")[1:2]
        if path.suffix == ".py" and name(path).startswith("bkpool/") and room[0] in rooms:
            imported = re.findall(r"^ *(?:from|import) bkpool\.(\w+)", text(path), flags=re.MULTILINE)
            found |= {(room[0], other) for other in imported if other in rooms and other != room[0]}
    return found


def _arrows_between_rooms() -> set[tuple[str, str]]:
    picture = re.search(
        r"^## Rooms.*?^```mermaid\n(.*?)^```", text(ROOT / "ARCHITECTURE.md"), re.MULTILINE | re.DOTALL
    )
    assert picture
    lines = [line.partition("-->") for line in re.sub(r'\["[^"]*"\]', "", picture[1]).splitlines()[1:]]
    return {(start.strip(), end.strip()) for start, _, ends in lines for end in ends.split("&") if end.strip()}


def _reached_along(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    reached: set[tuple[str, str]] = set()
    more = arrows
    while more - reached:
        reached |= more
        more = {(start, far) for start, middle in reached for near, far in arrows if near == middle}
    return reached


def _is_field(event: str) -> bool:
    """Fields of a pool's spec look like events: `gateway.replicas`."""
    return f"| `{event}` |" in text(ROOT / "docs" / "pool-spec.md")
