"""Makes stored objects that this version cannot read, as another version or a person might have written them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any


def spoil(path: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a stored document behind the store's back. Watches see it with the store's next write of that kind.

    Args:
        path: The file of the store.
        name: The name of the object.
        change: Changes the document.
    """
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        ((data,),) = db.execute("SELECT data FROM objects WHERE name = ?", [name]).fetchall()
        ((version,),) = db.execute("SELECT MAX(version) + 1 FROM events").fetchall()
        doc = json.loads(data)
        change(doc)
        doc["metadata"]["resourceVersion"] = str(version)
        new = doc["metadata"]["name"]
        db.execute("UPDATE objects SET data = ?, name = ? WHERE name = ?", [json.dumps(doc), new, name])
        db.execute("INSERT INTO events VALUES (?, ?, 'MODIFIED', ?)", [version, doc["kind"], json.dumps(doc)])
        db.execute("COMMIT")


def garble(path: Path, name: str, content: bytes) -> None:
    """Stores something that is no document at all.

    Args:
        path: The file of the store.
        name: The name of the object.
        content: What is stored for it.
    """
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE objects SET data = CAST(? AS TEXT) WHERE name = ?", [content, name])


def stored_bytes(path: Path, name: str) -> bytes:
    """What is stored for the object of that name."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        ((data,),) = db.execute("SELECT CAST(data AS BLOB) FROM objects WHERE name = ?", [name]).fetchall()
    return bytes(data)
