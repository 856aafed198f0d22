"""Makes the key of a client and the request for its certificate. The key never leaves this machine.

cryptography is imported only when a key is made: most commands need no key.
"""

from __future__ import annotations


def make() -> tuple[bytes, str]:
    """A new P-256 key (PKCS #8) and its certificate request, both in PEM.

    The request has an empty subject, because the API uses only its key.
    """
    from cryptography import x509  # noqa: PLC0415 - only when a key is made
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem, request.public_bytes(serialization.Encoding.PEM).decode()
