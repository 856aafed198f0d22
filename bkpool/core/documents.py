"""Pools and issuers from YAML: one file, one or several documents, all of them right or none taken.

Text in, objects out; it reads no file and stores nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import yaml

from bkpool.core.auth import OIDCConfig
from bkpool.core.errors import InvalidInput
from bkpool.core.pool import Pool
from bkpool.core.resource import Resource, parse_object

MAX_CHARACTERS = 1_000_000
"""A file beyond this is a mistake; it bounds the work on foreign input."""


@dataclass(frozen=True, slots=True)
class Documents:
    """What a file says."""

    pools: tuple[Pool, ...] = ()
    configs: tuple[OIDCConfig, ...] = ()

    def __add__(self, other: Documents) -> Documents:
        """Both together."""
        return Documents((*self.pools, *other.pools), (*self.configs, *other.configs))

    def check_once(self) -> None:
        """That nothing is there twice. Raises InvalidInput."""
        objects: list[Resource] = [*self.pools, *self.configs]
        counted = Counter((obj.KIND, obj.key) for obj in objects)
        for (kind, key), times in counted.items():
            if times > 1:
                raise InvalidInput(f"{kind} {key} is there {times} times", hint="Keep one of them.")


def read_documents(text: str, *, source: str) -> Documents:
    """Reads the BuildKitPool and BuildKitOIDCConfig documents of a file.

    Args:
        text: The YAML.
        source: The file's name, for errors.

    Raises:
        InvalidInput: It is no YAML, a document is of another kind, a field is wrong, or an object is there twice.
    """
    if len(text) > MAX_CHARACTERS:
        raise InvalidInput(f"{source}: larger than {MAX_CHARACTERS} characters", hint="Split the file.")
    try:
        documents = [found for found in yaml.safe_load_all(text) if found is not None]
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f"{source}, line {place.line + 1}, column {place.column + 1}" if place else source
        problem = getattr(error, "problem", None) or "not YAML"
        raise InvalidInput(f"{where}: {problem}", hint="Correct the YAML at that place.") from None
    except (ValueError, RecursionError, AttributeError, LookupError):
        # A date that is none; brackets without end; an explicit tag that its value does not fit (!!bool x).
        raise InvalidInput(f"{source}: not YAML", hint="Correct the YAML.") from None
    if not documents:
        raise InvalidInput(f"{source}: has no document", hint="See examples/pool.yaml for a pool.")
    read = [_read(document, f"{source}, document {number}") for number, document in enumerate(documents, 1)]
    found = Documents(
        tuple(obj for obj in read if isinstance(obj, Pool)), tuple(obj for obj in read if isinstance(obj, OIDCConfig))
    )
    try:
        found.check_once()
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
        hint="Other kinds of documents are not understood here.",
        field="kind",
    )
