"""RSA keys for tests: made once and stored as their primes, because making one takes a tenth of a second.

They are public. Nothing outside of the tests uses them, and two calls never return the same one.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa

BITS, EXPONENT = 2048, 65537
_stored = Path(__file__).with_suffix(".txt").read_text().splitlines()


def rsa_key(bits: int = BITS) -> rsa.RSAPrivateKey:
    """Returns a stored key that no call before has returned. Makes one if none is left, or for another size."""
    if bits != BITS or not _stored:
        return rsa.generate_private_key(EXPONENT, bits)
    p, q = (int(prime, 16) for prime in _stored.pop(0).split())
    d = rsa.rsa_recover_private_exponent(EXPONENT, p, q)
    parts = (rsa.rsa_crt_dmp1(d, p), rsa.rsa_crt_dmq1(d, q), rsa.rsa_crt_iqmp(p, q))
    numbers = rsa.RSAPrivateNumbers(p, q, d, *parts, rsa.RSAPublicNumbers(EXPONENT, p * q))
    return numbers.private_key(unsafe_skip_rsa_key_validation=True)
