"""Makes the key of a client and the request for its certificate. The key never leaves this machine.

Everything in both but the key and the signature is always the same. So cryptography makes only these two: to import
what it has for X.509 takes 40 ms, and this 9. It is imported when a key is made, which most commands never do.
"""

from __future__ import annotations

from base64 import b64encode

_P256 = bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107")
"""The kind of the key: id-ecPublicKey, on the curve secp256r1 (RFC 5480 2.1.1)."""
_ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
"""The kind of the signature (RFC 5758 3.2)."""
_POINT = b"\x04"  # not compressed (SEC 1, 2.3.3)


def make() -> tuple[bytes, str]:
    """A new P-256 key (PKCS #8) and its certificate request (PKCS #10), both in PEM.

    The request has an empty subject, because the API uses only its key.
    """
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415 - only when a key is made
    from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415

    key = ec.generate_private_key(ec.SECP256R1())
    numbers = key.private_numbers()
    x, y = (number.to_bytes(32) for number in (numbers.public_numbers.x, numbers.public_numbers.y))
    public = _bits(_POINT + x + y)
    request = _der(0x30, _integer(0) + _der(0x30) + _der(0x30, _P256 + public) + _der(0xA0))
    signature = _bits(key.sign(request, ec.ECDSA(SHA256())))
    # RFC 5915 3, in RFC 5208 5
    private = _der(0x30, _integer(1) + _der(0x04, numbers.private_value.to_bytes(32)) + _der(0xA1, public))
    pem = _pem("PRIVATE KEY", _der(0x30, _integer(0) + _P256 + _der(0x04, private)))
    return pem, _pem("CERTIFICATE REQUEST", _der(0x30, request + _ECDSA_SHA256 + signature)).decode()


def _der(tag: int, content: bytes = b"") -> bytes:
    """One value of DER (X.690 8.1.3), of less than 256 bytes."""
    length = bytes([len(content)]) if len(content) < 0x80 else bytes([0x81, len(content)])  # noqa: PLR2004
    return bytes([tag]) + length + content


def _integer(number: int) -> bytes:
    return _der(0x02, bytes([number]))


def _bits(content: bytes) -> bytes:
    return _der(0x03, b"\0" + content)


def _pem(label: str, der: bytes) -> bytes:
    """As RFC 7468 wants it: 64 characters in a line."""
    text = b64encode(der)
    lines = [text[begin : begin + 64] for begin in range(0, len(text), 64)]
    name = label.encode()
    return b"\n".join([b"-----BEGIN " + name + b"-----", *lines, b"-----END " + name + b"-----", b""])
