"""Counts the records of a TLS stream, which OpenSSL does not: it gives their data, and nothing for those without.

It reads the headers, which are not encrypted. It decrypts nothing and judges nothing.
"""

from __future__ import annotations

_HEADER = 5
"""Bytes of a record's header: type, version, and two bytes of length (RFC 8446 section 5.1)."""


class RecordCounter:
    """The records of one direction, from the beginning of a record on."""

    __slots__ = ("_next", "_split")

    def __init__(self) -> None:
        self._next = 0  # where the next header begins, in the bytes that come next
        self._split = b""  # the part of a header that has come

    @property
    def between(self) -> bool:
        """The bytes that come next begin with a header."""
        return not (self._next or self._split)

    def count(self, data: memoryview) -> int:
        """Returns how many records have their header complete with these bytes of the stream."""
        at, count = self._next, 0
        if self._split:
            header = self._split + data[: _HEADER - len(self._split)]
            if len(header) < _HEADER:
                self._split = header
                return 0
            at, count = _HEADER - len(self._split) + (header[3] << 8 | header[4]), 1
        last = len(data) - _HEADER
        while at <= last:
            at += _HEADER + (data[at + 3] << 8 | data[at + 4])
            count += 1
        self._split = bytes(data[at:])
        self._next = max(0, at - len(data)) if not self._split else 0
        return count
