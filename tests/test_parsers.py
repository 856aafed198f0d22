"""Bytes and documents of others, at every door that nobody else's tests fuzz: what is wrong is one of our errors.

Each door is given noise, and good input with a fault in it, which comes further in.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bkpool.cli.options import lease_token
from bkpool.core import durations, tokens
from bkpool.core.auth import OIDCConfig
from bkpool.core.documents import read_documents
from bkpool.core.errors import BkpoolError
from bkpool.core.names import Key, Slot
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata, parse_object
from bkpool.core.worker import Worker, new_worker
from bkpool.gateway.session.certificate import token_digest
from bkpool.gateway.session.grpc_answer import GrpcAnswer
from bkpool.gateway.session.refusal import GrpcCode, Refusal
from bkpool.pki.authority import Authority, key_of_request
from bkpool.pki.names import parse_host, pool_named
from bkpool.workers.pods import pod_spec, pod_view
from bkpool.workers.pods.pod_spec import PodRequest

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
SLOT = Slot("default", "p", 0)
some = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def damaged(good: bytes) -> st.SearchStrategy[bytes]:
    """The same with some bytes of it changed, or its end cut off."""
    places = st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), min_size=1, max_size=4)

    def change(faults: list[tuple[int, int]]) -> bytes:
        changed = bytearray(good)
        for place, value in faults:
            changed[place] = value
        return bytes(changed)

    return places.map(change) | st.integers(0, len(good)).map(lambda end: good[:end])


def leaves(document: object, path: tuple = ()) -> list[tuple]:
    """The way to everything in a document."""
    found = [path] if path else []
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return found + [way for key, value in items for way in leaves(value, (*path, key))]


def altered(good: dict) -> st.SearchStrategy[object]:
    """A document with something else in one or two places."""
    change = st.tuples(st.sampled_from(leaves(good)), JSON)

    def apply(changes: list[tuple[tuple, object]]) -> object:
        made = copy.deepcopy(good)
        for way, value in changes:
            inner = made
            with suppress(KeyError, IndexError, TypeError):  # the first change has taken the place of the second
                for key in way[:-1]:
                    inner = inner[key]
                inner[way[-1]] = value
        return made

    return st.lists(change, min_size=1, max_size=2).map(apply)


AUTHORITY = Authority.create(NOW)
CERTIFICATE = x509.load_pem_x509_certificate(
    AUTHORITY.issue_client("T" * 43, NOW, NOW + timedelta(hours=1)).cert_pem
).public_bytes(serialization.Encoding.DER)
REQUEST = (
    x509.CertificateSigningRequestBuilder()
    .subject_name(x509.Name([]))
    .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    .public_bytes(serialization.Encoding.PEM)
)
POOL = Pool(metadata=Metadata(name="p", uid="u", creation_timestamp=NOW))
POD = pod_spec.pod(PodRequest(SLOT, "uid", "ann", POOL, "an/image", host_port=12400))
POD["metadata"] |= {"uid": "1", "resourceVersion": "1"}
POD["spec"]["nodeName"] = "node"
POD["status"] = {
    "phase": "Running",
    "podIP": "10.0.0.1",
    "reason": "",
    "message": "",
    "conditions": [{"type": "PodScheduled", "status": "False", "message": "x. y", "reason": "r"}],
    "containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull", "message": "m"}}}],
}
CONFIG = {
    "apiVersion": "buildkit.smrt-devops.net/v1alpha1",
    "kind": "BuildKitOIDCConfig",
    "metadata": {"name": "ci"},
    "spec": {"issuer": "https://issuer.example", "audience": "a", "claimsMapping": {"user": "sub"}, "pools": ["*"]},
}


@some
@given(st.binary(max_size=300) | damaged(CERTIFICATE))
def test_a_clients_certificate(der):
    with suppress(BkpoolError):
        assert token_digest(der, NOW) == tokens.digest("T" * 43)


@some
@given(st.binary(max_size=300) | damaged(REQUEST))
def test_a_certificate_request(pem):
    with suppress(BkpoolError):
        key_of_request(pem)


@some
@given(st.text(max_size=70) | st.from_regex(r"\A[+-]?([0-9]{0,30}\.?[0-9]*(ns|us|µs|ms|s|m|h)){1,4}\Z"))
def test_a_duration(text):
    with suppress(BkpoolError):
        assert durations.parse(text) >= timedelta(0)


@some
@given(st.text(max_size=60) | st.text("0123456789abcdef.:-[]%/", max_size=40))
def test_a_host(text):
    with suppress(BkpoolError):
        assert str(parse_host(text, "--gateway-host"))
    assert pool_named(text) is None or isinstance(pool_named(text), Key)


@some
@given(st.text(max_size=200) | st.text("-{}[]&*!|>%@`:,#\n\t \"'<?=0x_~", max_size=60))
def test_a_file_of_documents(text):
    with suppress(BkpoolError):
        read_documents(text, source="file")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "\0",
            "\ud800",
            "[" * 1500,
            "{" * 1500,
            "a: &a [*a]",
            "--- !!python/object:os.system {}",
            "2001-99-99",
        ),
        *(
            "? [a]\n: b",
            "!!binary x",
            "a: !!timestamp nonsense",
            "<<: 1",
            "\ufeff",
            "=",
            "!!bool x",
            '!!int ""',
            "!!set x",
            "!!omap [1]",
            "!!float x",
            "1:99999999999:1",
        ),
        "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nkind: *c",
    ],
)
def test_a_file_that_is_hostile(text):
    with pytest.raises(BkpoolError):
        read_documents(text, source="file")


@some
@given(st.data())
def test_an_object(data):
    kind, good = data.draw(
        st.sampled_from(
            [(Pool, POOL.to_json()), (Worker, new_worker(SLOT, POOL, None, {}).to_json()), (OIDCConfig, CONFIG)]
        )
    )
    with suppress(BkpoolError):
        parse_object(kind, data.draw(altered(good) | JSON))


@some
@given(st.text(max_size=60) | st.text(max_size=30).map('{{"token": "{}"}}'.format) | st.binary(max_size=60))
def test_a_file_with_a_lease(tmp_path: Path, text):
    file = tmp_path / "lease.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with suppress(BkpoolError):
        lease_token(f"@{file}")
    if isinstance(text, str) and "\0" not in text and text != "-":
        with suppress(BkpoolError):
            lease_token(text)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"


@some
@given(st.lists(st.binary(max_size=80), max_size=4), st.booleans())
def test_what_a_refused_client_says(parts, begins_well):
    answer = GrpcAnswer(Refusal(GrpcCode.UNAUTHENTICATED, "Code", "words – and 100 %"))
    for part in [PREFACE, *parts] if begins_well else parts:
        assert isinstance(answer.receive(part), bytes)
    assert isinstance(answer.goaway(), bytes)


READINGS = (
    pod_view.slot_in,
    pod_view.worker_uid,
    pod_view.cache_owner,
    pod_view.claim_of,
    pod_view.protected,
    pod_view.ended,
    pod_view.may_be_ending,
    pod_view.address,
    pod_view.host_port,
    pod_view.look,
    pod_view.ending,
)


@pytest.mark.parametrize("missing", leaves({key: POD[key] for key in ("status",)}), ids=str)
def test_a_pod_with_any_optional_part_missing(missing):
    """The API server checks types; what it may leave out, or say in words that are new to us, is what can be odd."""
    pod = copy.deepcopy(POD)
    inner = pod
    for key in missing[:-1]:
        inner = inner[key]
    removed = inner.pop(missing[-1])
    for read in READINGS:
        read(pod)
    if isinstance(removed, str):
        inner[missing[-1]] = "something new" * 100
        for read in READINGS:
            read(pod)
