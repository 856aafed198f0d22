"""A worker that was recognised before is asked with a short handshake, and another one is never taken for it."""

from __future__ import annotations

import contextlib
from datetime import timedelta

import pytest

from bkpool.buildkit import TlsSessions, ask_over_tls
from bkpool.buildkit.tls_client import TlsClient
from bkpool.core.errors import Unavailable, WorkerFailed
from support.stub_control import BACKEND, NOW, serve, server_context, tls

TEN_MINUTES = timedelta(minutes=10).total_seconds()


@contextlib.asynccontextmanager
async def worker(control, directory, port=0):
    """A worker with uid uid-1, which has made new keys for its sessions; its port."""
    async with serve(control, host="127.0.0.1", port=port, ssl=server_context(directory)) as server:
        yield server._server.sockets[0].getsockname()[1]


@pytest.fixture
def asked(control):
    """Asks, and returns whether the handshake was a short one."""

    async def ask(port, tls, sessions):
        await ask_over_tls("tcp://w", "127.0.0.1", port, tls, sessions)
        return control.transports[-1].get_extra_info("ssl_object").session_reused

    return ask


async def test_only_the_first_handshake_is_a_whole_one(control, tmp_path, asked):
    sessions, known = TlsSessions(), tls()
    async with worker(control, tmp_path) as port:
        assert [await asked(port, known, sessions) for _ in range(3)] == [False, True, True]
        assert not await asked(port, known, TlsSessions())
        assert not await asked(port, tls(), sessions), "another certificate of this side is shown to the worker"


async def test_a_worker_that_was_started_again_is_recognised_anew(control, tmp_path, asked):
    sessions, known = TlsSessions(), tls()
    async with worker(control, tmp_path) as port:
        await asked(port, known, sessions)
    async with worker(control, tmp_path, port):
        assert [await asked(port, known, sessions) for _ in range(2)] == [False, True]


async def test_another_worker_at_the_address_is_not_taken_for_this_one(control, tmp_path, asked):
    sessions, known = TlsSessions(), tls()
    async with worker(control, tmp_path) as port:
        await asked(port, known, sessions)
    leaf = BACKEND.issue_worker("uid-2", NOW)
    (tmp_path / "other.pem").write_bytes((leaf.key_pem or b"") + leaf.cert_pem)
    other = server_context(tmp_path)
    other.load_cert_chain(tmp_path / "other.pem")
    async with serve(control, host="127.0.0.1", port=port, ssl=other):
        with pytest.raises(WorkerFailed, match="uid-2"):
            await asked(port, known, sessions)
    assert len(control.requests) == 1, "the other worker was not called"


async def test_a_worker_that_did_not_answer_is_recognised_anew(control, tmp_path, asked):
    sessions, known = TlsSessions(), tls()
    async with worker(control, tmp_path) as port:
        await asked(port, known, sessions)
    with pytest.raises(Unavailable):
        await asked(port, known, sessions)
    assert sessions.get(known.worker_uid, known.context, 0) is None


async def test_a_session_is_good_for_one_context_and_ten_minutes(control, tmp_path, asked):
    sessions, known = TlsSessions(), tls()
    async with worker(control, tmp_path) as port:
        await asked(port, known, sessions)
    kept = sessions._kept[known.worker_uid]
    assert sessions.get(known.worker_uid, known.context, kept.until - 1) is kept.session
    assert sessions.get(known.worker_uid, known.context, kept.until) is None
    assert sessions.get(known.worker_uid, tls().context, kept.until - 1) is None
    sessions.put(known.worker_uid, known.context, kept.session, 100.0)
    assert sessions._kept[known.worker_uid].until == 100.0 + TEN_MINUTES


async def test_sessions_have_a_bound(control, tmp_path, asked, monkeypatch):
    monkeypatch.setattr("bkpool.buildkit.tls_client._MOST", 2)
    sessions, known = TlsSessions(), tls()
    async with worker(control, tmp_path) as port:
        await asked(port, known, sessions)
    session = sessions._kept[known.worker_uid].session
    for uid in ("a", "b", "c"):
        sessions.put(uid, known.context, session, 0.0)
    assert list(sessions._kept) == ["b", "c"]
    sessions.put("c", known.context, None, 0.0)
    assert list(sessions._kept) == ["b"]


def test_what_is_no_tls_is_an_error():
    client = TlsClient(tls().context)
    assert client.begin()
    with pytest.raises(OSError):
        client.receive(b"HTTP/1.1 400 Bad Request\r\n\r\n")
