"""Reads pools and issuers from YAML with one or several documents. If one of them is wrong, none is taken.

It gets text and returns objects. It reads no file and stores nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pydantic.alias_generators import to_snake

from bkpool.core import disk_size, yaml_text
from bkpool.core.auth import OIDCConfig
from bkpool.core.errors import InvalidInput
from bkpool.core.pool import Pool
from bkpool.core.resource import Resource, parse_object
from bkpool.core.unknown_fields import unknown_fields

MAX_CHARACTERS = 1_000_000
"""A larger file is a mistake. The limit also bounds the work on untrusted input."""


@dataclass(frozen=True, slots=True)
class Documents:
    """The objects of a file."""

    pools: tuple[Pool, ...] = ()
    configs: tuple[OIDCConfig, ...] = ()

    def __add__(self, other: Documents) -> Documents:
        """The objects of both."""
        return Documents((*self.pools, *other.pools), (*self.configs, *other.configs))

    def check_unique(self) -> None:
        """Raises InvalidInput if an object is there more than once."""
        objects: list[Resource] = [*self.pools, *self.configs]
        counted = Counter((obj.KIND, obj.key) for obj in objects)
        for (kind, key), times in counted.items():
            if times > 1:
                raise InvalidInput(f"{kind} {key} is defined {times} times", hint="Keep one of them.")


def read_documents(text: str, *, source: str) -> Documents:
    """Reads the BuildKitPool and BuildKitOIDCConfig documents of a file.

    Args:
        text: The YAML.
        source: The file's name, for error messages.

    Raises:
        InvalidInput: It is not YAML, its aliases repeat too much, a document has another kind, a field is wrong or
            not known, or an object is there twice.
    """
    if len(text) > MAX_CHARACTERS:
        raise InvalidInput(f"{source}: larger than {MAX_CHARACTERS} characters", hint="Split the file.")
    try:
        documents = [found for found in yaml_text.load_all(text) if found is not None]
    except yaml_text.UnreadableYaml as error:
        raise InvalidInput(f"{source}{error.where}: {error.problem}", hint="Correct the YAML there.") from None
    if not documents:
        raise InvalidInput(f"{source}: there is no document in it", hint="See examples/pool.yaml for a pool.")
    read = [_read(document, f"{source}, document {number}") for number, document in enumerate(documents, 1)]
    for number, obj in enumerate(read):
        _refuse_unknown_fields(obj, text, number, source)
        if isinstance(obj, Pool):
            _refuse_unusable_sizes(obj, text, number, source)
    found = Documents(
        tuple(obj for obj in read if isinstance(obj, Pool)), tuple(obj for obj in read if isinstance(obj, OIDCConfig))
    )
    try:
        found.check_unique()
    except InvalidInput as error:
        raise InvalidInput(f"{source}: {error.message}", hint=error.hint) from None
    return found


def _refuse_unknown_fields(obj: Pool | OIDCConfig, text: str, number: int, source: str) -> None:
    """Raises InvalidInput if a document has a field that bkpool does not know: most likely it is misspelt.

    Args:
        obj: The object of the document.
        text: The file.
        number: The number of the document, from 0.
        source: The file's name.
    """
    unknown = list(unknown_fields(obj))
    if not unknown:
        return
    first = unknown[0]
    place = _place(text, number, source, first.path)
    question = f"; {first.question}" if first.question else ""
    more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
    raise InvalidInput(
        f"{place}: {first.dotted}: there is no such field{question}{more}",
        hint="Correct its name, or remove it. docs/pool-spec.md and docs/access.md have all fields.",
        field=first.dotted,
    )


def _refuse_unusable_sizes(pool: Pool, text: str, number: int, source: str) -> None:
    """Raises InvalidInput if buildkitd could not hold a size. In a stored pool it is taken as the nearest one."""
    gc = pool.spec.cache.gc
    for name in ("keepStorage", "reservedSpace", "minFreeSpace"):
        size = getattr(gc, to_snake(name))
        if size is not None and (problem := disk_size.problem(size)):
            path = ("spec", "cache", "gc", name)
            raise InvalidInput(
                f"{_place(text, number, source, path)}: {'.'.join(path)}: {problem} (given: {size[:60]!r})",
                hint="A size that is larger than the disk sets no limit.",
                field=".".join(path),
            )


def _place(text: str, number: int, source: str, path: tuple[str | int, ...]) -> str:
    """Where a field of a file is.

    Args:
        text: The file.
        number: The number of the document, from 0.
        source: The file's name.
        path: The field.
    """
    line = yaml_text.line_of(text, number, path)
    return f"{source}, document {number + 1}" + (f", line {line}" if line else "")


def _read(document: object, source: str) -> Pool | OIDCConfig:
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind == Pool.KIND:
        return parse_object(Pool, document, source=source)
    if kind == OIDCConfig.KIND:
        return parse_object(OIDCConfig, document, source=source)
    raise InvalidInput(
        f"{source}: kind: expected {Pool.KIND} or {OIDCConfig.KIND}, found {kind!r}",
        hint="Remove this document, or correct its kind.",
        field="kind",
    )
