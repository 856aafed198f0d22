"""The API's TLS on a real socket: which certificate a caller gets, and that a new one needs no restart."""

import asyncio
import ssl
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from bkpool.appliance.api_tls import api_names, make_api_tls
from bkpool.appliance.http import serve
from bkpool.appliance.preflight import check_settings
from bkpool.appliance.run_options import RunOptions
from bkpool.core.errors import HostFault, InvalidInput
from bkpool.core.wall_clock import LONGEST_SLEEP
from bkpool.gateway.control.server import new_loop as new_gateway_loop
from bkpool.home.files import private_directory
from bkpool.pki.authority import Authority
from bkpool.settings import Settings

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def authority():
    return Authority.create(NOW)


@pytest.fixture
def options(tmp_path):
    private_directory(tmp_path / "pki")

    def make(**sections):
        return RunOptions(home=tmp_path, cache=tmp_path, settings=Settings.model_validate(sections))

    return make


@pytest.fixture
async def served():
    """Serves with this TLS; returns a function that returns the certificate which a new caller gets."""
    async with AsyncExitStack() as stack:

        async def start(tls):
            address = await serve(stack, web.Application(), ("127.0.0.1", 0), "--api-address", tls.context)
            port = int(address.rpartition(":")[2])

            async def seen(ca=None, name=None, version=None):
                context = ssl.create_default_context(cadata=ca.cert_pem.decode() if ca else None)
                if ca is None:
                    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                if version:
                    context.minimum_version = context.maximum_version = version
                reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
                found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert (await reader.read()).startswith(b"HTTP/1.1 404")
                writer.close()
                await writer.wait_closed()
                return x509.load_der_x509_certificate(found)

            return seen

        yield start


async def test_a_caller_that_trusts_the_ca_can_use_every_name_of_the_api(options, authority, served):
    given = options(api={"tls": True}, gateway={"hosts": ("build.example.com",)})
    seen = await served(make_api_tls(given, authority, lambda: NOW))
    names = ("127.0.0.1", "localhost", "build.example.com", "buildkit-controller.buildkit-system.svc")
    serials = {(await seen(authority, name)).serial_number for name in names}
    assert len(serials) == 1
    await seen(authority, "localhost", ssl.TLSVersion.TLSv1_2)
    with pytest.raises(ssl.SSLCertVerificationError):
        await seen(authority, "elsewhere.example.com")


async def test_the_certificate_has_the_life_of_the_settings(options, authority, served):
    given = options(api={"tls": True}, certificates={"server_life": timedelta(days=9)})
    seen = await served(make_api_tls(given, authority, lambda: NOW))
    assert (await seen()).not_valid_after_utc == NOW.replace(microsecond=0) + timedelta(days=9)


async def test_the_certificate_is_renewed_in_time_and_open_connections_continue(options, authority, served):
    now = NOW
    tls = make_api_tls(options(api={"tls": True}), authority, lambda: now)
    seen = await served(tls)
    first = await seen()
    assert not tls.refresh()
    assert tls.pause() == LONGEST_SLEEP, "the machine may sleep until it is due"
    now = first.not_valid_after_utc - timedelta(days=29)
    assert tls.pause() == 3600.0, "a certificate that its CA caps is always due"
    assert tls.refresh()
    second = await seen()
    assert second.not_valid_after_utc > first.not_valid_after_utc
    assert not tls.refresh()


def test_the_description_names_the_ca_that_callers_trust(options, authority, tmp_path):
    tls = make_api_tls(options(api={"tls": True}), authority, lambda: NOW)
    assert tls.description == {"apiCa": str(tmp_path / "pki" / "ca.crt")}
    assert (tmp_path / "pki" / "ca.crt").read_bytes() == authority.cert_pem


def test_the_api_address_is_one_of_its_names(options):
    names = api_names(options(api={"address": ("192.0.2.7", 8082)}, kubernetes={"namespace": "ci"}))
    assert ip_address("192.0.2.7") in names.ips
    assert "buildkit-controller.ci.svc.cluster.local" in names.dns
    assert ip_address("0.0.0.0") not in api_names(options(api={"address": ("0.0.0.0", 8082)})).ips


@pytest.mark.parametrize(
    ("given", "where"),
    [({"api": {"address": ("a_b", 8082)}}, "--api-address"), ({"gateway": {"hosts": ("a_b",)}}, "--gateway-host")],
)
def test_a_name_that_no_certificate_can_have_names_its_setting(options, given, where):
    with pytest.raises(InvalidInput, match=f"^{where}: 'a_b' is neither a DNS name nor an IP address") as caught:
        api_names(options(**given))
    assert caught.value.field == where


def test_there_is_no_tls_unless_the_user_asked_for_it(options, authority):
    assert make_api_tls(options(), authority, lambda: NOW) is None


def rsa_pair():
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "own")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(7).not_valid_before(NOW).not_valid_after(NOW + timedelta(days=1))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM), key


def pkcs8(key, encryption=None):
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


async def test_changed_files_are_used_and_a_bad_file_changes_nothing(options, authority, served, tmp_path):
    """The key changes from elliptic to RSA: a single OpenSSL context would then keep both certificates."""
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    leaf = authority.issue_server(["localhost"], [], NOW, NOW + timedelta(days=1))
    cert.write_bytes(leaf.cert_pem)
    key.write_bytes(leaf.key_pem)
    tls = make_api_tls(options(api={"cert": cert, "key": key}), authority, lambda: NOW)
    assert tls.description == {"apiCert": str(cert)}
    seen = await served(tls)
    first = await seen(authority, "localhost")
    own, own_key = rsa_pair()
    for bad_cert, bad_key in [
        (own, leaf.key_pem),  # in the middle of a change
        (b"no", pkcs8(own_key)),
        (own, b"no"),
        (own, pkcs8(own_key, BestAvailableEncryption(b"secret"))),
    ]:
        cert.write_bytes(bad_cert)
        key.write_bytes(bad_key)
        assert not tls.refresh()
        assert (await seen()).serial_number == first.serial_number
    cert.unlink()
    assert not tls.refresh()
    cert.write_bytes(own)
    key.write_bytes(pkcs8(own_key))
    assert tls.refresh()
    assert (await seen()).serial_number == (await seen(name="localhost")).serial_number == 7
    assert not tls.refresh()


DAMAGED = b"-----BEGIN {}-----\nMA==\n-----END {}-----\n"
KEY_FAULT, CERT_FAULT = r"BKPOOL_API_KEY: .*tls\.key cannot be used: ", r"--api-cert: .*tls\.crt cannot be used: "
MISMATCH = r"--api-cert and BKPOOL_API_KEY: the key .*tls\.key does not belong to the certificate .*tls\.crt$"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("key", None, f"{KEY_FAULT}No such file"),
        ("key", b"", f"{KEY_FAULT}it is not a PEM private key"),
        ("key", DAMAGED.replace(b"{}", b"PRIVATE KEY"), f"{KEY_FAULT}it is not a PEM private key"),
        ("key", pkcs8(ec.generate_private_key(ec.SECP256R1())), MISMATCH),
        ("key", pkcs8(rsa_pair()[1]), MISMATCH),
        (
            "key",
            pkcs8(ec.generate_private_key(ec.SECP256R1()), BestAvailableEncryption(b"secret")),
            f"{KEY_FAULT}the key has a passphrase",
        ),
        ("crt", None, f"{CERT_FAULT}No such file"),
        ("crt", b"", f"{CERT_FAULT}it is not a PEM certificate"),
        ("crt", DAMAGED.replace(b"{}", b"CERTIFICATE"), f"{CERT_FAULT}it is not a PEM certificate"),
        ("crt", rsa_pair()[0], MISMATCH),
    ],
)
def test_a_bad_file_is_an_error_at_the_start_that_names_what_gave_it(
    options, authority, tmp_path, file, content, message
):
    leaf = authority.issue_server(["localhost"], [], NOW, NOW + timedelta(days=1))
    contents = {"crt": leaf.cert_pem, "key": leaf.key_pem, file: content}
    for name, one in contents.items():
        if one is not None:
            (tmp_path / f"tls.{name}").write_bytes(one)
    given = options(api={"cert": tmp_path / "tls.crt", "key": tmp_path / "tls.key"})
    given = replace(given, places={"api.cert": "--api-cert", "api.key": "BKPOOL_API_KEY"})
    with pytest.raises(HostFault, match=f"^{message}") as caught:
        make_api_tls(given, authority, lambda: NOW)
    assert caught.value.code == "Unreadable"


def test_beyond_this_machine_the_api_needs_tls_or_plain_http(options, tmp_path):
    beyond = {"address": ("192.0.2.1", 8082)}
    with pytest.raises(InvalidInput, match="in clear"):
        check_settings(options(api=beyond))
    for given in ({"tls": True}, {"plain_http": True}, {"cert": tmp_path, "key": tmp_path}):
        check_settings(options(api={**beyond, **given}))


@pytest.mark.parametrize(("given", "missing"), [("cert", "--api-key"), ("key", "--api-cert")])
def test_certificate_and_key_must_both_be_given(options, tmp_path, given, missing):
    with pytest.raises(InvalidInput, match=missing) as caught:
        check_settings(options(api={given: tmp_path}))
    assert caught.value.field == missing


@pytest.mark.parametrize("new_loop", [new_gateway_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
def test_nothing_that_a_stranger_sends_makes_the_loop_report_an_error(options, authority, new_loop):
    """What a loop reports goes to the log with a traceback."""
    tls = make_api_tls(options(api={"tls": True}), authority, lambda: NOW)
    reported = []

    async def visit():
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reported.append(context))
        async with AsyncExitStack() as stack:
            address = await serve(stack, web.Application(), ("127.0.0.1", 0), "--api-address", tls.context)
            port = int(address.rpartition(":")[2])
            for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
                for sent in BAD_RECORDS:
                    await visit_badly(port, version, sent, after_handshake=True)
                    await visit_badly(port, version, sent, after_handshake=False)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(visit())
    assert reported == []


BAD_RECORDS = [
    b"no TLS at all\r\n\r\n",
    b"\x17\x03\x03\x00\x30" + b"x" * 48,  # application data of another key
    b"\x16\x03\x03\x00\x30" + b"x" * 48,  # a handshake once more
    b"\x15\x03\x03\x00\x02\x02\x28",  # an alert in clear
    b"\x17\x03\x03\xff\xff" + b"x" * 100,  # a record that is too long
]


async def visit_badly(port, version, sent, *, after_handshake):
    """Sends these bytes instead of a record, in the middle of a request, and waits until the server has closed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode, context.maximum_version = False, ssl.CERT_NONE, version
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while after_handshake:
        try:
            client.do_handshake()
            client.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx")
            break
        except ssl.SSLWantReadError:
            writer.write(outgoing.read())
            incoming.write(await reader.read(65536))
    writer.write(outgoing.read() + sent)
    writer.write_eof()
    with suppress(ConnectionError):
        while await reader.read(65536):
            pass
    writer.close()
