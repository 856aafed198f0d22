"""How many bytes are moved in one step, and the memory for them, which all connections of one event loop share.

These sizes decide how fast the relay is and how much memory a connection holds (docs/benchmarks.md). Nothing here
reads from a socket or sends to one.
"""

from __future__ import annotations

MAX_RECORD = 16 * 1024
"""Bytes of plaintext in one TLS record, at most (RFC 8446 section 5.1)."""

RECORD_OVERHEAD = 22
"""Bytes that TLS 1.3 adds to a record: header, content type and tag (RFC 8446 section 5.2)."""

PLAINTEXT_CHUNK = 3 * MAX_RECORD
"""Bytes of plaintext that are read in one step to be encrypted. TCP passes on at most 64 KiB in one piece. Four TLS
records exceed 64 KiB by about 100 bytes; the rest goes out separately and wakes the peer again, which cost 50 % more
with one stream (docs/benchmarks.md). Three records fit."""

CIPHERTEXT_CHUNK = 7 * (MAX_RECORD + RECORD_OVERHEAD)
"""Bytes of ciphertext that are read in one step to be decrypted and encrypted again. These are whole records if the
peer sends full ones, as peers do when they send much data. Encrypted again, they fill almost two pieces of TCP."""

DECRYPT_CHUNK = 3 * (MAX_RECORD + RECORD_OVERHEAD)
"""Bytes of ciphertext that are given to OpenSSL in one step. A MemoryBIO keeps the largest size that it ever had.
With larger steps each connection that was once busy would hold more memory. This size also fits in the CPU's
caches."""

MAX_READ = 5 * DECRYPT_CHUNK
"""Bytes that are taken from a socket in one step, at most."""


SMALL_READ = 4096
"""Bytes that are read in one step from a peer whose last bytes were many small records, and from a new one. A small
record costs as much as a large one: a whole step of records with one byte each takes 10 ms, and with hundreds of such
connections everyone else waits for seconds."""


class LoopBuffers:
    """Memory that all connections of one event loop share. Its content is valid within one callback only."""

    __slots__ = ("plaintext", "received", "received_ciphertext", "received_plaintext", "received_small")

    def __init__(self) -> None:
        self.received = memoryview(bytearray(MAX_READ))
        """For what is only decrypted. The other three are its beginning."""
        self.received_ciphertext = self.received[:CIPHERTEXT_CHUNK]
        """For what is decrypted and encrypted again."""
        self.received_plaintext = self.received[:PLAINTEXT_CHUNK]
        """For what is not encrypted."""
        self.received_small = self.received[:SMALL_READ]
        """For many small records."""
        # Room for what one step decrypts, and for the record of which the earlier steps have read a part.
        self.plaintext = memoryview(bytearray(MAX_READ + 2 * MAX_RECORD))
