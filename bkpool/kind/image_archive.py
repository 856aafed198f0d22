"""Reads which images an archive of `docker save` contains. It extracts nothing."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from bkpool.core.errors import InvalidInput


def archive_images(file: Path, where: str) -> dict[str, str]:
    """The images in an archive: name to ID (sha256:…). Empty if the archive has no list of them (plain OCI).

    Args:
        file: The archive.
        where: What gave it, for the message.

    Raises:
        InvalidInput: The file does not exist, or it is not an image archive.
    """
    try:
        with tarfile.open(file) as archive:
            try:
                listed = archive.extractfile("manifest.json")
            except KeyError:
                return {}
            entries = json.load(listed) if listed else []
        return {
            name: "sha256:" + Path(entry["Config"]).name.removesuffix(".json")
            for entry in entries
            for name in entry.get("RepoTags") or ()
        }
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not an image archive"
        raise InvalidInput(
            f"{where}: {file}: {reason}",
            hint="Create one with `docker save -o FILE IMAGE`.",
            field=where,
        ) from None
