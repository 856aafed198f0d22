"""Malicious certificates, each sent to a gateway that other clients use.

Each gets a TLS alert or a sentence, reaches no worker, and leaves nothing behind: `support.attack` checks that after
each test. test_gateway and test_rejected_access test clients without a certificate, or with one of a foreign CA, of
another time, for servers or of another pool.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bkpool.core import tokens
from bkpool.core.names import Key
from bkpool.core.worker import EndReason
from support import forged
from support.attack import attacked_gateway
from support.certificates import NOW
from support.forged import attribute, der, subject

VICTIM = tokens.derive(b"key", "uid", "a")
"""The token of a valid lease. A certificate that is accepted as that of this lease would reach a worker."""
OURS = f"alloc:{VICTIM}"
PRIVATE = "1.3.6.1.4.1.99999"
"""The object identifiers of unknown extensions are below it."""
WEAK = "ALL:@SECLEVEL=0"
"""With these ciphers OpenSSL lets a client send certificates that it would refuse (SSL_CTX_set_security_level(3))."""


@pytest.fixture
async def world(new_world, capfd):
    async with attacked_gateway(new_world, capfd) as attacked:
        attacked.world.lease("a")
        yield attacked.world


async def connect_with_certificate(world, identity):
    """Connects with any certificate, also one that a client's OpenSSL would normally not send."""
    context = world.ca.client_context()
    context.set_ciphers(WEAK)
    context.load_cert_chain(*identity.files)
    return await world.connect_with(context)


async def tls_alert(world, identity):
    """Returns the TLS alert for this certificate. In TLS 1.3 a client gets it after its handshake."""
    streams = await connect_with_certificate(world, identity)
    with pytest.raises(ssl.SSLError) as caught:
        async with asyncio.timeout(60):
            await streams.reader.read()
    return caught.value.reason.lower().replace("_", " ")


def issued(key, *, issuer_key, issuer="a CA of the tests", name=OURS, algorithm=None, more=()):
    """Returns a certificate for clients, correct except for what the arguments change."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=3650))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    )
    for extension in more:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(issuer_key, algorithm or hashes.SHA256())


def identity_of(ca, certificate, key):
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return ca.stored(certificate.public_bytes(Encoding.PEM), private)


def renamed(ca, name):
    """Returns the victim's certificate with this subject, signed by our CA."""
    identity = ca.client(VICTIM)
    certificate = x509.load_der_x509_certificate(identity.der)
    changed = forged.forged(certificate, ca._key, {forged.subject_of(certificate): name})
    return ca.stored(ssl.DER_cert_to_PEM_cert(changed).encode(), identity.key)


# --- refused by TLS -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("issuer", [OURS, "a CA of the tests"], ids=["names itself", "names our CA"])
async def test_a_self_signed_certificate_gets_an_alert(world, issuer):
    """Also if it names our CA as its issuer: only the signature counts."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = issued(key, issuer_key=key, issuer=issuer)
    alert = await tls_alert(world, identity_of(world.ca, certificate, key))
    assert "unknown ca" in alert or "decrypt error" in alert


async def test_a_changed_certificate_of_our_ca_gets_an_alert(world):
    """A lease's certificate with one letter of the token changed."""
    mine = world.ca.client(world.token("attacker"))
    changed = mine.der.replace(world.token("attacker").encode(), VICTIM.encode())
    assert changed != mine.der
    alert = await tls_alert(world, world.ca.stored(ssl.DER_cert_to_PEM_cert(changed).encode(), mine.key))
    assert "decrypt error" in alert


async def test_a_key_of_rsa_1024_gets_an_alert(world):
    """Although our CA signed it: an attacker may have computed the key."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    certificate = issued(key, issuer_key=world.ca._key)
    assert "bad certificate" in await tls_alert(world, identity_of(world.ca, certificate, key))


async def test_a_signature_with_sha_1_gets_an_alert(world):
    """Although our CA signed it: an attacker may have found a second certificate with the same signature."""
    mine = world.ca.client(VICTIM)
    weak = forged.forged(x509.load_der_x509_certificate(mine.der), world.ca._key, {}, algorithm=forged.ECDSA_SHA1)
    alert = await tls_alert(world, world.ca.stored(ssl.DER_cert_to_PEM_cert(weak).encode(), mine.key))
    assert "bad certificate" in alert


def with_long_chain(ca, identity, count):
    """Returns the certificate, followed by this many unrelated certificates of 10 KB each."""
    key = ec.generate_private_key(ec.SECP256R1())
    filling = x509.UnrecognizedExtension(x509.ObjectIdentifier(f"{PRIVATE}.1"), os.urandom(10_000))
    chain = [issued(key, issuer_key=key, issuer="nobody", name="x", more=[filling]) for _ in range(count)]
    return replace(identity, cert=identity.cert + b"".join(each.public_bytes(Encoding.PEM) for each in chain))


async def test_a_chain_of_more_than_100_kb_gets_an_alert(world):
    """OpenSSL accepts at most 100 KiB (SSL_CTX_set_max_cert_list(3)), and does not parse a longer chain."""
    streams = await connect_with_certificate(world, with_long_chain(world.ca, world.ca.client(VICTIM), 11))
    with pytest.raises(
        (ssl.SSLError, ConnectionError)
    ):  # the reset may overtake the alert, because OpenSSL stops reading
        async with asyncio.timeout(60):
            await streams.reader.read()
    await world.wait_until(lambda: world.metric("refusals_total", pool="", reason="TlsFailed") == 1)


async def test_of_a_chain_of_nearly_100_kb_only_the_first_certificate_counts(world):
    """The other certificates are ignored: the client of an unknown lease gets its sentence."""
    stranger = world.ca.client(world.token("unknown"))
    code, sentence = await (await connect_with_certificate(world, with_long_chain(world.ca, stranger, 9))).call()
    assert code == 16
    assert sentence.startswith("no lease has the token of this client certificate.")


# --- refused by the gateway with a sentence -------------------------------------------------------------------------

NAMES = {
    "absent": subject(),
    "absent beside others": subject(attribute(b"x", kind=forged.ORGANIZATION)),
    "double": subject(attribute(OURS.encode()), attribute(OURS.encode())),
    "double, first another": subject(attribute(b"x"), attribute(OURS.encode())),
    "double, in one set": der(
        forged.SEQUENCE, der(forged.SET, attribute(OURS.encode()), attribute(OURS.encode() + b"x"))
    ),
    "double, the same in one set": der(forged.SEQUENCE, der(forged.SET, *[attribute(OURS.encode())] * 2)),
    "empty": subject(attribute(b"")),
    "of 65 characters": subject(attribute(OURS.encode().ljust(65, b"A"))),
    "of 65 characters, padded with spaces": subject(attribute(OURS.encode().ljust(65))),
    "of 60 KB": subject(attribute(OURS.encode().ljust(60_000, b"A"))),
    "with NUL behind it": subject(attribute(OURS.encode() + b"\0")),
    "with NUL and another name behind it": subject(attribute(OURS.encode() + b"\0.example.com")),
    "with NUL before it": subject(attribute(b"\0" + OURS.encode())),
    "with NUL in it": subject(attribute(OURS.encode()[:-1] + b"\0")),
    "as BMPString": subject(attribute(OURS.encode("utf-16-be"), forged.BMP)),
    "as BIT STRING": subject(attribute(b"\0" + OURS.encode(), forged.BIT_STRING)),
    "prefix in other case": subject(attribute(f"Alloc:{VICTIM}".encode())),
    "with a space before it": subject(attribute(f" {OURS}".encode())),
    "with a space behind it": subject(attribute(f"{OURS} ".encode())),
    "with a space inside": subject(attribute(f"alloc: {VICTIM}".encode())),
    "alloc: alone": subject(attribute(b"alloc:")),
    "token alone": subject(attribute(VICTIM.encode())),
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
async def test_a_name_that_is_not_exactly_that_of_a_lease_is_refused_with_a_sentence(world, name):
    """Signed by our CA, which would never issue it. It is never read as the victim's name."""
    code, sentence = await (await connect_with_certificate(world, renamed(world.ca, name))).call()
    assert code == 16
    assert sentence.startswith("the client certificate does not belong to a lease: ")
    assert sentence.endswith("Run `bkpool allocate` and use the certificate that it returns.")
    assert VICTIM not in sentence
    assert world.metric("refusals_total", pool="", reason="WrongCertificate") == 1


@pytest.mark.parametrize(
    "token", [VICTIM.swapcase(), "A" * 43, VICTIM[::-1]], ids=["in other case", "all one letter", "backwards"]
)
async def test_an_unknown_token_of_the_right_length_is_refused_with_a_sentence(world, token):
    code, sentence = await (await connect_with_certificate(world, world.ca.client(token))).call()
    assert (code, sentence) == (
        16,
        "no lease has the token of this client certificate. Run `bkpool allocate` again.",
    )


async def test_a_duplicate_extension_is_refused_with_a_sentence(world):
    """RFC 5280 section 4.2 forbids it. OpenSSL accepts it, and cryptography raises a special exception."""
    key = ec.generate_private_key(ec.SECP256R1())
    one, other = (x509.UnrecognizedExtension(x509.ObjectIdentifier(f"{PRIVATE}.{last}"), b"\5\0") for last in (1, 2))
    certificate = issued(key, issuer_key=world.ca._key, more=[one, other])
    changed = forged.forged(certificate, world.ca._key, {_oid(2): _oid(1)})
    again = x509.load_der_x509_certificate(changed)
    code, sentence = await (await connect_with_certificate(world, identity_of(world.ca, again, key))).call()
    assert code == 16
    assert sentence.startswith("the client certificate does not belong to a lease: ")


def _oid(last):
    return bytes.fromhex("06092b06010401868d1f") + bytes([last])


@pytest.mark.parametrize("how", ["released", "expired", "forgotten", "another pool's"])
async def test_a_refused_lease_takes_no_slot(world, how):
    """Ten in a row: each gets its sentence, and both slots stay free."""
    match how:
        case "released":
            world.end_lease("a", EndReason.RELEASED)
        case "expired":
            world.lease("a", expires_at=NOW.timestamp())
        case "forgotten":
            world.forget_lease("a")
    name = "q.team.svc" if how == "another pool's" else "localhost"
    assert Key("team", "q") in world.pools
    for _ in range(10):
        code, sentence = await (await world.connect(VICTIM, name=name)).call()
        assert code == (7 if how == "another pool's" else 16)
        assert "Run `bkpool allocate` again." in sentence or "gatewayEndpoint" in sentence
