"""Pools from YAML: one file, one or several documents, all of them right or none taken.

Text in, objects out; it reads no file and stores nothing.
"""

from __future__ import annotations

import yaml

from bkpool.core.errors import InvalidInput
from bkpool.core.objects import Pool
from bkpool.core.resource import parse_object

MAX_CHARACTERS = 1_000_000
"""A file of pools beyond this is a mistake; it bounds the work on foreign input."""


def read_pools(text: str, *, source: str) -> list[Pool]:
    """Reads the BuildKitPool documents of a file.

    Args:
        text: The YAML.
        source: The file's name, for errors.

    Raises:
        InvalidInput: It is no YAML, a document is no BuildKitPool, a field is wrong, or a pool is there twice.
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
    if not documents:
        raise InvalidInput(f"{source}: has no document", hint="See examples/pool.yaml for a pool.")
    pools = [_read_pool(document, f"{source}, document {number}") for number, document in enumerate(documents, 1)]
    keys = [pool.key for pool in pools]
    for key in keys:
        if keys.count(key) > 1:
            raise InvalidInput(f"{source}: pool {key} is there {keys.count(key)} times", hint="Keep one of them.")
    return pools


def _read_pool(document: object, source: str) -> Pool:
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind != Pool.KIND:
        raise InvalidInput(
            f"{source}: kind: expected {Pool.KIND}, found {kind!r}",
            hint=f"Only {Pool.KIND} documents are understood here.",
            field="kind",
        )
    return parse_object(Pool, document, source=source)
