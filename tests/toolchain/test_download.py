from __future__ import annotations

import datetime as dt
import json
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from bkpool.core.errors import HostFault
from bkpool.toolchain import Tool, Toolchain
from bkpool.toolchain.download import digest_in

GOOD, OTHER = "a" * 64, "b" * 64


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"{GOOD}  tool\n", GOOD),
        (f"{OTHER} *tool2\n{GOOD} *tool\r\n", GOOD),
        (f"{GOOD}  dist/tool\n", GOOD),
        (f"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\n{GOOD}  tool\n-----BEGIN PGP SIGNATURE-----\n", GOOD),
        (f"{GOOD}  tool\n{GOOD}  tool\n", GOOD),
        (f"{GOOD}  tool\n{OTHER}  tool\n", None),
        (f"{GOOD}  tool.sig\n", None),
        (f"{GOOD[:63]}  tool\n", None),
        (f"{GOOD}\n", None),
        ("", None),
        (json.dumps({"subject": [{"name": "tool", "digest": {"sha256": GOOD}}]}), GOOD),
        (json.dumps({"subject": [{"name": "tool", "digest": {"sha1": GOOD}}]}), None),
        (json.dumps({"subject": [{"name": "other", "digest": {"sha256": GOOD}}]}), None),
        (json.dumps({"subject": "tool"}), None),
        ('{"subject": ', None),
        ("{" * 100_000, None),
        ('{"a":' * 100_000, None),
    ],
)
def test_a_digest_is_found_in_the_published_formats_only(text, found):
    assert digest_in(text.encode(), "tool") == found


@given(
    st.one_of(
        st.binary(),
        st.text().map(str.encode),
        st.dictionaries(st.text(), st.text()).map(lambda d: json.dumps(d).encode()),
    )
)
def test_no_digests_file_makes_the_reader_fail(text):
    assert digest_in(text, "tool") is None


@pytest.fixture
def tls(releases, tmp_path, monkeypatch):
    """The releases behind TLS, with a certificate that this process trusts."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + dt.timedelta(hours=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (tmp_path / "server.pem").write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "server.pem"))
    plain = releases.url
    releases.use_tls(context)
    return plain


@pytest.mark.usefixtures("tls", "no_go")
def test_a_release_is_downloaded_over_tls(releases, tmp_path):
    assert Toolchain(tmp_path, search_path="", mirror=releases.url).ensure(Tool.RUNC).exists()


@pytest.mark.usefixtures("no_go")
def test_a_redirect_from_tls_to_plain_http_is_refused_even_on_loopback(releases, tls, tmp_path):
    releases.redirects[releases.asset(Tool.RUNC)] = f"{tls}/plain"
    with pytest.raises(HostFault, match="which is not https"):
        Toolchain(tmp_path, search_path="", mirror=releases.url).ensure(Tool.RUNC)


@pytest.mark.usefixtures("tls", "no_go")
def test_a_server_with_an_untrusted_certificate_is_refused(releases, tmp_path, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(HostFault, match="CERTIFICATE_VERIFY_FAILED"):
        Toolchain(tmp_path, search_path="", mirror=releases.url).ensure(Tool.RUNC)
