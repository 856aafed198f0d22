"""Reads pools and issuers from YAML with one or several documents. If one of them is wrong, none is taken.

It gets text and returns objects. It reads no file and stores nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from bkpool.core import yaml_text
from bkpool.core.auth import OIDCConfig
from bkpool.core.errors import InvalidInput
from bkpool.core.pool import Pool
from bkpool.core.resource import Resource, parse_object

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
        InvalidInput: It is not YAML, its aliases repeat too much, a document has another kind, a field is wrong, or
            an object is there twice.
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
    found = Documents(
        tuple(obj for obj in read if isinstance(obj, Pool)), tuple(obj for obj in read if isinstance(obj, OIDCConfig))
    )
    try:
        found.check_unique()
    except InvalidInput as error:
        raise InvalidInput(f"{source}: {error.message}", hint=error.hint) from None
    return found


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
