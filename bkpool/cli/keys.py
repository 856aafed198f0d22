"""A client's key, and the request that has it certified: the key never leaves this machine.

cryptography is imported only when a key is made: most commands need none.
"""

from __future__ import annotations


def make() -> tuple[bytes, str]:
    """A fresh P-256 key (PKCS #8), and its certificate request; both PEM.

    The request names nobody, since the API takes only the key from it.
    """
    from cryptography import x509  # noqa: PLC0415 - see above
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem, request.public_bytes(serialization.Encoding.PEM).decode()
