from __future__ import annotations

import asyncio
import base64
import json
import os

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bkpool.core.auth import RESERVED_PREFIXES, Auth, TokenFrom
from bkpool.core.errors import Forbidden, HostFault, NotFound, Unavailable
from bkpool.core.names import Key
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.remembered_caller import CallerMethod
from bkpool.core.resource import Metadata
from bkpool.home.files import write_private
from bkpool.identity import Identity, Scope, Verdict
from bkpool.identity.static_token_parser import StaticTokens, parse_static_tokens
from bkpool.identity.static_tokens import FRESH_SECONDS, FileTokenReader, SecretTokenReader, StaticTokenAuthenticator
from support.captured_logs import capture_logs

ALICE, BOB = "alices-token-of-32-characters-xx", "bobs-token-0123456789"
SECRET = TokenFrom(secret_ref="tokens")


def who(tokens: StaticTokens, bearer: str) -> list[str]:
    return [entry.user for entry in tokens.of(bearer)]


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "user"),
    [
        ("alice", ALICE, "alice"),
        ("alice", f"{ALICE}\n", "alice"),
        ("alice", {"token": ALICE}, "alice"),
        ("old", {"token": ALICE, "user": "alice"}, "alice"),
        ("old", json.dumps({"token": ALICE, "user": "alice"}), "alice"),
        ("old", f"user: alice\ntoken: {ALICE}\n", "alice"),
        (ALICE, json.dumps({"user": "alice", "pools": ["*"]}), "alice"),
        (ALICE, {"user": "alice"}, "alice"),
        ("x", {"token": f"{'a' * 15}=", "user": "ann o'neill <a@example.com>"}, "ann o'neill <a@example.com>"),
    ],
)
def test_every_form_of_an_entry_is_parsed(key, value, user):
    tokens = parse_static_tokens({key: value})
    assert tokens.faults == ()
    token = ALICE if ALICE in f"{key}{value}" else value["token"]
    assert who(tokens, token) == [user]
    assert who(tokens, f"{token}x") == who(tokens, token[:-1]) == who(tokens, "") == []


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("alice", "a" * 15, "shorter than 16"),
        (ALICE, "alice", "shorter than 16"),
        ("alice", "", "neither a token"),
        ("alice", None, "neither a token"),
        ("alice", 1234567890123456789, "neither a token"),
        ("alice", [ALICE], "neither a token"),
        ("alice", f"{ALICE} with blanks", "neither a token"),
        ("alice", "{" * 900, "line 1, column 101: it is nested in more than 100 levels"),
        ("alice", "[" * 900, "line 1, column 101: it is nested in more than 100 levels"),
        ("alice", f"token: '{ALICE}", "neither a token"),
        (
            "alice",
            f"user: &a alice\ntoken: {ALICE}\npools: [*a]",
            "line 3, column 9: aliases (*name) are not allowed",
        ),
        ("alice", f"<<: {{user: alice}}\ntoken: {ALICE}", "line 1, column 1: merge keys (<<) are not allowed"),
        ("alice", f"token: {ALICE}\npools: [{'1:' * 60}1]", "a number of more than 100 characters"),
        ("alice", f"token: {ALICE}\n{'#' * 4096}", "more than 4096 characters in YAML: write it in JSON"),
        ("alice", {"token": f"{ALICE} with blanks"}, "has a character other than"),
        ("alice", {"token": f"{ALICE}\n"}, "has a character other than"),
        ("alice", {"token": 1234567890123456789}, "has a character other than"),
        ("alice", {"token": "ä" * 20}, "has a character other than"),
        ("alice", {"token": None}, "has a character other than"),
        (ALICE, {}, "no `user`"),
        (ALICE, {"pools": ["*"]}, "no `user`"),
        (ALICE, {"user": ""}, "no `user`"),
        (ALICE, {"user": 7}, "no `user`"),
        (ALICE, {"user": "a\nb"}, "printable"),
        (ALICE, {"user": " alice"}, "printable"),
        (ALICE, {"user": "a" * 257}, "printable"),
        *((ALICE, {"user": f"{prefix}x"}, "begins with") for prefix in RESERVED_PREFIXES),
        ("system:admin", ALICE, "begins with"),
        (7, ALICE, "no `user`"),
        (ALICE, {"user": "alice", "pools": "*"}, "pools"),
        (ALICE, {"user": "alice", "pools": [1]}, "pools"),
    ],
)
def test_a_fault_names_no_token_and_does_not_affect_other_entries(key, value, says):
    tokens = parse_static_tokens({key: value, "bob": BOB})
    assert [entry.user for entry in tokens.entries] == ["bob"]
    (fault,) = tokens.faults
    assert fault.startswith(("entry 1 of 2: ", "entry 1 of 2, line "))
    assert says in fault
    assert "alice" not in fault
    assert ALICE not in repr(tokens), "only digests are kept"
    assert who(tokens, ALICE) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.fixed_dictionaries({}, optional={"user": JSON, "pools": JSON, "token": JSON})


@given(
    st.dictionaries(
        st.text(max_size=30) | st.integers() | st.none(), JSON | OBJECTS | OBJECTS.map(json.dumps), max_size=4
    )
)
def test_any_content_is_an_entry_or_a_fault(data):
    tokens = parse_static_tokens(data)
    assert len(tokens.entries) + len(tokens.faults) == len(data)
    for entry in tokens.entries:
        assert len(entry.digest) == 64
        assert 0 < len(entry.user) <= 256
        assert entry.user.isprintable()
        assert not entry.user.startswith(RESERVED_PREFIXES)


def doubling(levels: int) -> str:
    """A few hundred bytes that stand for 2 ** levels fields."""
    lines = [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], k{n}: x}}" for n in range(1, levels)]
    return "\n".join(["a0: &a0 {k: x}", *lines])


def test_a_small_entry_that_stands_for_millions_of_fields_costs_nothing():
    tokens = parse_static_tokens({"bomb": doubling(60), "bob": BOB})
    assert tokens.faults == (
        "entry 1 of 2, line 2, column 15: aliases (*name) are not allowed here: write the value out",
    )
    assert who(tokens, BOB) == ["bob"]


def test_the_entries_in_yaml_have_a_limit_together_and_those_in_json_do_not_count():
    entries = {f"user-{n}": f"user: u{n}\ntoken: t{n:020}\n{'#' * 3000}" for n in range(20)}
    as_json = {f"json-{n}": json.dumps({"user": f"j{n}", "token": f"j{n:020}", "x": "#" * 3000}) for n in range(20)}
    tokens = parse_static_tokens(entries | as_json)
    assert len(tokens.entries) == 10 + 20
    assert {fault.split(": ", 1)[1] for fault in tokens.faults} == {
        "all entries in YAML have more than 32768 characters: write them in JSON"
    }


def test_a_user_may_have_an_old_and_a_new_token():
    tokens = parse_static_tokens({"alice": ALICE, "alice.next": json.dumps({"user": "alice", "token": BOB})})
    assert who(tokens, ALICE) == who(tokens, BOB) == ["alice"]


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files():
    reader = FileTokenReader()
    yield reader
    reader.close()


async def test_a_file_is_read_again_when_it_has_changed(tmp_path, files):
    path = tmp_path / "tokens.yaml"
    source = TokenFrom(file=str(path))
    write_private(path, f"alice: {ALICE}\n".encode())
    first = await files.read("default", source)
    assert who(first, ALICE) == ["alice"]
    assert await files.read("default", source) is first

    write_private(path, json.dumps({"alice": BOB}).encode())
    second = await files.read("default", source)
    assert who(second, ALICE) == []
    assert who(second, BOB) == ["alice"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.chmod(0o640), "open to other users"),
        (lambda path: path.write_text(""), "not a mapping"),
        (lambda path: path.write_text("- a"), "not a mapping"),
        (lambda path: path.write_text(f"bob: x\nalice: '{ALICE}"), "line 2: it is not YAML"),
        (lambda path: path.write_text(f"a: &a {ALICE}\nb: *a"), r"line 2: aliases \(\*name\) are not allowed here"),
        (lambda path: path.write_text(f"a:\n  <<: {{token: {ALICE}}}"), r"line 2: merge keys \(<<\) are not allowed"),
        (lambda path: path.write_bytes(b"\xff\x00"), "not YAML"),
        (lambda path: path.write_text("a" * ((1 << 20) + 1)), "larger"),
        (lambda path: (path.unlink(), path.mkdir(0o700)), "directory"),
    ],
)
async def test_no_token_of_an_unsafe_file_is_accepted(tmp_path, files, spoil, says):
    path = tmp_path / "tokens.yaml"
    write_private(path, f"alice: {ALICE}\n".encode())
    await files.read("default", TokenFrom(file=str(path)))
    spoil(path)
    with pytest.raises(HostFault, match=says) as refused:
        await files.read("default", TokenFrom(file=str(path)))
    assert ALICE not in f"{refused.value.message}{refused.value.hint}"
    assert str(path) in refused.value.message


async def test_each_reader_ignores_the_sources_of_the_other(files):
    assert await files.read("default", SECRET) == StaticTokens()
    assert await SecretTokenReader(Cluster()).read("default", TokenFrom(file="/nowhere")) == StaticTokens()


# --- Secrets --------------------------------------------------------------------------------------------------------


class Cluster:
    """A KubeApi with Secrets that can fail, and that counts its requests."""

    def __init__(self, **data: str) -> None:
        self.version = 0
        self.asked: list[str] = []
        self.error: Exception | None = None
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.reached = asyncio.Event()
        self.put(**data)

    def put(self, **data: str) -> None:
        self.version += 1
        self.data = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}

    async def get(self, path: str) -> dict:
        self.asked.append(path)
        self.reached.set()
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        return {"metadata": {"resourceVersion": str(self.version)}, "data": self.data}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_secret_is_read_again_after_ten_seconds():
    cluster, clock = Cluster(alice=ALICE), Clock()
    secrets = SecretTokenReader(cluster, clock)
    for _ in range(3):
        assert who(await secrets.read("team", SECRET), ALICE) == ["alice"]
    assert cluster.asked == ["/api/v1/namespaces/team/secrets/tokens"]

    cluster.put(alice=BOB)
    clock.now = FRESH_SECONDS - 0.1
    assert who(await secrets.read("team", SECRET), ALICE) == ["alice"]
    clock.now = FRESH_SECONDS
    assert who(await secrets.read("team", SECRET), ALICE) == []
    assert who(await secrets.read("team", SECRET), BOB) == ["alice"]

    cluster.error = NotFound("no such Secret")
    clock.now = 2 * FRESH_SECONDS
    assert await secrets.read("team", SECRET) == StaticTokens()
    cluster.error = None
    clock.now = 3 * FRESH_SECONDS
    assert who(await secrets.read("team", SECRET), BOB) == ["alice"], (
        "the Secret is back, at the version that was known"
    )


async def test_a_secret_that_does_not_come_in_time_is_unavailable():
    cluster = Cluster(alice=ALICE)
    cluster.may_answer.clear()
    async with asyncio.timeout(60):
        with pytest.raises(Unavailable, match=r"Secret team/tokens could not be read within 0\.05 s"):
            await SecretTokenReader(cluster, Clock(), timeout=0.05).read("team", SECRET)


async def test_many_callers_at_once_cause_one_request_even_if_the_first_is_cancelled():
    cluster = Cluster(alice=ALICE)
    secrets = SecretTokenReader(cluster, Clock())
    cluster.may_answer.clear()
    calls = [asyncio.create_task(secrets.read("team", SECRET)) for _ in range(5)]
    await cluster.reached.wait()
    calls[0].cancel()
    cluster.may_answer.set()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert [who(tokens, ALICE) for tokens in answers[1:]] == [["alice"]] * 4
    assert len(cluster.asked) == 1


async def test_old_tokens_of_a_secret_that_cannot_be_read_are_not_accepted():
    cluster, clock = Cluster(alice=ALICE), Clock()
    secrets = SecretTokenReader(cluster, clock)
    await secrets.read("team", SECRET)
    cluster.error, clock.now = Unavailable("away"), FRESH_SECONDS
    for _ in range(3):
        with pytest.raises(Unavailable, match="away"):
            await secrets.read("team", SECRET)
    assert len(cluster.asked) == 2, "a failure is cached, too"
    cluster.error, clock.now = None, 2 * FRESH_SECONDS
    assert who(await secrets.read("team", SECRET), ALICE) == ["alice"]


async def test_a_value_that_is_not_text_is_a_fault():
    cluster = Cluster(alice=ALICE)
    cluster.data["bytes"] = base64.b64encode(b"\xff" * 20).decode()
    cluster.data["none"] = "%%%"
    tokens = await SecretTokenReader(cluster, Clock()).read("team", SECRET)
    assert who(tokens, ALICE) == ["alice"]
    assert len(tokens.faults) == 2


# --- who is calling -------------------------------------------------------------------------------------------------


def a_pool(name: str, *sources: dict) -> Pool:
    methods = [{"type": "token", "token": source} for source in sources]
    return Pool(metadata=Metadata(name=name, namespace="team"), spec=PoolSpec(auth=Auth(methods=methods)))


class Memory:
    """Tokens, or an error, by the name of the Secret."""

    def __init__(self, **secrets: object) -> None:
        self.secrets = secrets

    async def read(self, namespace: str, source: TokenFrom) -> StaticTokens:
        found = self.secrets[source.secret_ref]
        if isinstance(found, Exception):
            raise found
        return parse_static_tokens(found)


def known(pool: str, user: str) -> Verdict:
    source = f"BuildKitPool team/{pool} (token)"
    authority, scope = f"tokens of team/{pool}", Scope("team", pool)
    identity = Identity(user, authority, source=source, scope=scope, method=CallerMethod.TOKEN)
    return Verdict(source, identity)


async def test_a_token_is_valid_for_the_pools_that_have_it():
    reader = Memory(a={"alice": ALICE}, b={"al": ALICE, "bob": BOB})
    pools = [a_pool("one", {"secretRef": "a"}), a_pool("two", {"secretRef": "b"}), a_pool("three")]
    tokens = StaticTokenAuthenticator(reader, lambda: pools)

    assert await tokens.authenticate(ALICE) == (known("one", "alice"), known("two", "al"))
    assert await tokens.authenticate(BOB) == (known("two", "bob"),)
    assert await tokens.authenticate("another-token-that-nobody-has") == ()
    pools.pop(1)
    assert await tokens.authenticate(BOB) == ()


async def test_all_secrets_of_a_pool_are_read():
    reader = Memory(a={"alice": ALICE}, b={"bob": BOB})
    tokens = StaticTokenAuthenticator(reader, lambda: [a_pool("one", {"secretRef": "a"}, {"secretRef": "b"})])
    assert await tokens.authenticate(BOB) == (known("one", "bob"),)


class Slow(Memory):
    """As Memory, but the Secret `slow` is never read."""

    async def read(self, namespace: str, source: TokenFrom) -> StaticTokens:
        if source.secret_ref == "slow":
            await asyncio.Event().wait()
        return await super().read(namespace, source)


async def test_the_secret_of_one_pool_does_not_delay_the_callers_of_another():
    reader = Slow(good={"alice": ALICE})
    pools = [a_pool("slow", {"secretRef": "slow"}), a_pool("good", {"secretRef": "good"})]
    tokens = StaticTokenAuthenticator(reader, lambda: pools, others_timeout=3600)
    async with asyncio.timeout(60):
        assert await tokens.authenticate(ALICE, Key("team", "good")) == (known("good", "alice"),)


async def test_a_caller_of_no_pool_in_particular_does_not_wait_long_for_one():
    reader = Slow(good={"alice": ALICE})
    pools = [a_pool("slow", {"secretRef": "slow"}), a_pool("good", {"secretRef": "good"})]
    tokens = StaticTokenAuthenticator(reader, lambda: pools, others_timeout=0.01)
    refused = Verdict("static tokens", refusal="the tokens of a pool cannot be read now")
    async with asyncio.timeout(60):
        for pool in (None, Key("team", "unknown")):
            while (found := await tokens.authenticate(ALICE, pool)) == (refused, refused):
                pass  # on a busy machine tokens that need no wait may be late, too
            assert found == (refused, known("good", "alice"))


async def test_a_token_of_another_pool_is_still_recognised():
    reader = Memory(a={"alice": ALICE}, b={"bob": BOB})
    pools = [a_pool("one", {"secretRef": "a"}), a_pool("two", {"secretRef": "b"})]
    tokens = StaticTokenAuthenticator(reader, lambda: pools)
    assert await tokens.authenticate(ALICE, Key("team", "two")) == (known("one", "alice"),)


@pytest.mark.parametrize(
    ("pools", "fits"),
    [
        (["one"], True),
        (["team/one"], True),
        (["o*"], True),
        (["x", "*"], True),
        (None, True),
        (["two"], False),
        (["other/one"], False),
        ([], False),
    ],
)
async def test_a_token_may_be_restricted_to_some_pools(pools, fits):
    reader = Memory(a={ALICE: {"user": "alice", "pools": pools}})
    (verdict,) = await StaticTokenAuthenticator(reader, lambda: [a_pool("one", {"secretRef": "a"})]).authenticate(
        ALICE
    )
    assert (verdict.identity is not None) is fits
    assert bool(verdict.refusal) is verdict.genuine is not fits
    assert ALICE not in repr(verdict)


@pytest.mark.parametrize("error", [Unavailable("away"), Forbidden("no right"), HostFault("open to others")])
async def test_tokens_that_cannot_be_read_do_not_affect_other_callers(error):
    reader = Memory(bad=error, good={"alice": ALICE})
    pools = [a_pool("one", {"secretRef": "bad"}), a_pool("two", {"secretRef": "good"})]
    tokens = StaticTokenAuthenticator(reader, lambda: pools)

    refused, let_in = await tokens.authenticate(ALICE)
    assert (refused.identity, refused.genuine) == (None, False)
    assert refused.refusal == "the tokens of a pool cannot be read now"
    assert let_in == known("two", "alice")


async def test_a_fault_is_logged_once_until_it_changes():
    reader = Memory(a={"alice": "short", "bob": BOB})
    tokens = StaticTokenAuthenticator(reader, lambda: [a_pool("one", {"secretRef": "a"})])
    with capture_logs() as logs:
        for _ in range(3):
            await tokens.authenticate(ALICE)
        reader.secrets["a"] = Unavailable("away")
        for _ in range(3):
            await tokens.authenticate(ALICE)
        reader.secrets["a"] = {"bob": BOB}
        for _ in range(3):
            await tokens.authenticate(ALICE)
    assert [(entry["event"], entry.get("reason")) for entry in logs] == [
        ("static_tokens.faulty", "Secret team/a: entry 1 of 2: its token is shorter than 16 characters"),
        ("static_tokens.faulty", "away"),
        ("static_tokens.repaired", None),
    ]


async def test_a_token_file_of_a_pool_end_to_end(tmp_path, files):
    path = tmp_path / "tokens.yaml"
    write_private(path, yaml.safe_dump({"alice": ALICE, "ci": {"token": BOB, "pools": ["other"]}}).encode())
    tokens = StaticTokenAuthenticator(files, lambda: [a_pool("one", {"file": str(path)})])
    assert await tokens.authenticate(ALICE) == (known("one", "alice"),)
    (verdict,) = await tokens.authenticate(BOB)
    assert verdict.refusal == "this token of ci is not for pool team/one"
    os.chmod(path, 0o644)  # noqa: PTH101
    (verdict,) = await tokens.authenticate(ALICE)
    assert verdict.refusal == "the tokens of a pool cannot be read now"
