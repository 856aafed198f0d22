"""Authentication with a real API server: its ServiceAccounts, tokens in its Secrets, and issuers as custom
resources."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
import yaml
from pydantic import ValidationError

from bkpool.controller.oidc_configs import OIDCConfigController
from bkpool.core.auth import OIDCConfig, OIDCConfigSpec
from bkpool.core.errors import Unavailable
from bkpool.core.names import AUDIENCE
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.remembered_caller import CallerMethod
from bkpool.core.resource import Metadata
from bkpool.identity import Identity
from bkpool.identity.service_accounts import ServiceAccountAuthenticator
from bkpool.identity.static_tokens import FRESH_SECONDS, SecretTokenReader, StaticTokenAuthenticator
from bkpool.install import crds
from bkpool.kube import ClusterAccess, KubeApi, paths
from bkpool.store.kubernetes import KubernetesStore
from bkpool.store.mirror import Mirror

ALICE, BOB = "alices-token-of-32-characters-xx", "bobs-token-0123456789"
ISSUER = "https://issuer.example.com"

# --- ServiceAccounts ------------------------------------------------------------------------------------------------


def a_token(kubectl, namespace, account="default", audience=AUDIENCE):
    return kubectl("create", "token", account, "-n", namespace, f"--audience={audience}").strip()


async def test_a_serviceaccount_is_identified_by_its_token(api, kubectl, namespace):
    (verdict,) = await ServiceAccountAuthenticator(api).authenticate(a_token(kubectl, namespace))
    assert verdict.identity == Identity(
        f"system:serviceaccount:{namespace}:default",
        authority="kubernetes",
        source="ServiceAccount token",
        groups=("system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"),
        method=CallerMethod.SERVICE_ACCOUNT,
    )


@pytest.mark.parametrize("audience", ["https://kubernetes.default.svc.cluster.local", "vault"])
async def test_a_token_for_another_audience_is_refused(api, kubectl, namespace, audience):
    token = a_token(kubectl, namespace, audience=audience)
    (verdict,) = await ServiceAccountAuthenticator(api).authenticate(token)
    assert verdict.identity is None
    assert f"is for ['{audience}'], not for '{AUDIENCE}'" in verdict.refusal
    assert (await ServiceAccountAuthenticator(api, audience).authenticate(token))[0].identity is not None


async def test_a_deleted_serviceaccount_is_refused_within_seconds(api, kubectl, namespace):
    kubectl("create", "serviceaccount", "ci", "-n", namespace)
    accounts, token = ServiceAccountAuthenticator(api), a_token(kubectl, namespace, "ci")
    (verdict,) = await accounts.authenticate(token)
    assert verdict.identity is not None
    kubectl("delete", "serviceaccount", "ci", "-n", namespace)

    verdict = await refused(accounts, token)
    assert verdict.refusal.startswith("Kubernetes refuses the ServiceAccount token")

    kubectl("create", "serviceaccount", "ci", "-n", namespace)
    (verdict,) = await accounts.authenticate(token)
    assert verdict.identity is None, "a new account of the same name is another one"


async def refused(accounts, token):
    """Waits until a token is refused, and returns the verdict. The API server caches a token for some seconds."""
    async with asyncio.timeout(90):
        while True:
            (verdict,) = await accounts.authenticate(token)
            if verdict.identity is None:
                return verdict


async def test_a_forged_token_is_refused(api, kubectl, namespace):
    header, claims, signature = a_token(kubectl, namespace).split(".")
    forged = f"{header}.{claims}.{signature[:-8]}{'A' * 8}"
    (verdict,) = await ServiceAccountAuthenticator(api).authenticate(forged)
    assert verdict.identity is None
    assert signature[:20] not in verdict.refusal


async def test_an_unreachable_api_server_or_a_missing_right_is_no_refusal(cluster, kubectl, namespace, tmp_path):
    token = a_token(kubectl, namespace)
    for changes in (
        {"token": a_token(kubectl, namespace, audience=await _audience(cluster))},
        {"server": "https://127.0.0.1:1"},
    ):
        path = tmp_path / "kubeconfig"
        path.write_text(_changed(cluster.kubeconfig.read_text(), **changes))
        api = await KubeApi.connect(ClusterAccess(kubeconfig=path))
        try:
            with pytest.raises(Unavailable, match="cannot be checked"):
                await ServiceAccountAuthenticator(api).authenticate(token)
        finally:
            await api.close()


async def _audience(cluster) -> str:
    """Returns the audience of tokens for the API server itself."""
    api = await KubeApi.connect(ClusterAccess(kubeconfig=cluster.kubeconfig))
    try:
        return (await api.get("/.well-known/openid-configuration"))["issuer"]
    finally:
        await api.close()


def _changed(kubeconfig: str, token: str = "", server: str = "") -> str:
    document = yaml.safe_load(kubeconfig)
    if server:
        document["clusters"][0]["cluster"]["server"] = server
    if token:
        document["users"][0]["user"] = {"token": token}
    return yaml.safe_dump(document)


# --- tokens in Secrets ----------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def names(verdicts):
    return [verdict.identity.name for verdict in verdicts if verdict.identity]


async def test_tokens_of_a_secret_can_be_changed_at_run_time(api, kubectl, namespace):
    spec = PoolSpec.model_validate({"auth": {"methods": [{"type": "token", "token": {"secretRef": "tokens"}}]}})
    pool, clock = Pool(metadata=Metadata(name="p", namespace=namespace), spec=spec), Clock()
    tokens = StaticTokenAuthenticator(SecretTokenReader(api, clock), lambda: [pool])

    def apply(**data: str) -> None:
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "tokens", "namespace": namespace}}
        kubectl("apply", "-f", "-", stdin=json.dumps({**secret, "stringData": data}))
        clock.now += FRESH_SECONDS

    assert await tokens.authenticate(ALICE) == ()
    apply(alice=f"{ALICE}\n", short="short")
    (verdict,) = await tokens.authenticate(ALICE)
    assert (verdict.identity.name, verdict.identity.scope.pool) == ("alice", "p")
    apply(alice=ALICE, next=json.dumps({"user": "alice", "token": BOB}))
    assert names(await tokens.authenticate(ALICE)) == names(await tokens.authenticate(BOB)) == ["alice"]
    kubectl("delete", "secret", "tokens", "-n", namespace)
    apply(**{BOB: json.dumps({"user": "bob", "pools": ["p"]})})
    assert names(await tokens.authenticate(ALICE)) == []
    assert names(await tokens.authenticate(BOB)) == ["bob"]
    kubectl("delete", "secret", "tokens", "-n", namespace)
    clock.now += FRESH_SECONDS
    assert await tokens.authenticate(BOB) == ()


# --- issuers as custom resources ------------------------------------------------------------------------------------

LEAST = {"issuer": ISSUER, "audience": "a"}
FULL = {
    **LEAST,
    "enabled": False,
    "claimsMapping": {"user": "actor", "pools": "pools", "groups": "kubernetes.io.groups"},
    "conditions": [
        {"claim": "repository_owner", "values": ["acme", True, False, 7, 0, -1]},
        {"claim": "ref", "patterns": ["refs/heads/*"]},
        {"claim": "ref", "values": [], "patterns": ["refs/heads/*"]},
    ],
    "tenantClaim": "repository",
    "clientID": "c",
    "clientSecretRef": {"name": "secret", "namespace": "default", "key": "key"},
    "pools": ["*"],
}


def a_document(name="tried", namespace="default", **spec):
    head = {"apiVersion": "buildkit.smrt-devops.net/v1alpha1", "kind": "BuildKitOIDCConfig"}
    return yaml.safe_dump({**head, "metadata": {"name": name, "namespace": namespace}, "spec": spec})


@pytest.fixture
async def tried(api, kubectl):
    await crds.install(api)
    return lambda **spec: json.loads(
        kubectl("apply", "--dry-run=server", "-o", "json", "-f", "-", stdin=a_document(**spec))
    )["spec"]


def test_the_api_server_accepts_and_stores_every_field_that_bkpool_reads(tried):
    assert tried(**FULL) == FULL
    filled = tried(**LEAST)
    assert filled == {**LEAST, "enabled": True, "claimsMapping": {"user": "sub"}}
    assert OIDCConfigSpec.model_validate(filled).model_dump() == OIDCConfigSpec.model_validate(LEAST).model_dump()


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"issuer": "http://issuer.example.com"}, "spec.issuer"),
        ({"issuer": "https://a@issuer.example.com"}, "spec.issuer"),
        ({"issuer": ""}, "spec.issuer"),
        ({"audience": ""}, "spec.audience"),
        ({"enabled": "yes"}, "spec.enabled"),
        ({"claimsMapping": {"user": ""}}, "spec.claimsMapping.user"),
        ({"conditions": [{"claim": "a"}]}, "spec.conditions[0]"),
        ({"conditions": [{"claim": "a", "values": []}]}, "spec.conditions[0]"),
        ({"conditions": [{"values": ["a"]}]}, "spec.conditions[0].claim"),
        ({"conditions": [{"claim": "a", "values": [{}]}]}, "spec.conditions[0].values[0]"),
        ({"conditions": [{"claim": "a", "values": [{"b": 1}]}]}, "spec.conditions[0].values[0]"),
        ({"conditions": [{"claim": "a", "values": [[]]}]}, "spec.conditions[0].values[0]"),
        ({"conditions": [{"claim": "a", "values": [["b"]]}]}, "spec.conditions[0].values[0]"),
        ({"conditions": [{"claim": "a", "values": [1.5]}]}, "spec.conditions[0].values[0]"),
        ({"conditions": [{"claim": "a", "patterns": [""]}]}, "spec.conditions[0].patterns[0]"),
        ({"tenantClaim": ""}, "spec.tenantClaim"),
        ({"pools": "*"}, "spec.pools"),
        ({"pools": [""]}, "spec.pools[0]"),
    ],
)
def test_a_wrong_value_of_an_issuer_is_refused_and_its_field_is_named(tried, wrong, field):
    with pytest.raises(AssertionError, match=r"invalid|BadRequest") as refused:
        tried(**{**LEAST, **wrong})
    assert field in str(refused.value)
    with pytest.raises(ValidationError):
        OIDCConfigSpec.model_validate({**LEAST, **wrong})


@pytest.fixture
async def emptied(api, kubectl) -> AsyncIterator[None]:
    await crds.install(api)
    kubectl("delete", "buildkitoidcconfigs", "--all", "-A")
    yield
    kubectl("delete", "buildkitoidcconfigs", "--all", "-A")


async def test_kubectl_shows_the_status_of_an_issuer(api, kubectl, namespace, emptied):
    async def probe(issuer: str) -> int:
        if issuer != ISSUER:
            raise Unavailable(f"{issuer} does not answer")
        return 2

    store = KubernetesStore(api)
    mirror = Mirror(store, configs=True)
    keeper = OIDCConfigController(store, mirror, probe, lambda: datetime.now(UTC))
    specs = {
        "away": {**LEAST, "issuer": "https://away.example.com"},
        "good": {**LEAST, "clientSecretRef": {"name": "secret"}},
        "open": {**LEAST, "issuer": "https://gitlab.com"},
    }
    for name, spec in specs.items():
        kubectl("apply", "-f", "-", stdin=a_document(name, namespace, **spec))
    body = asyncio.Event()
    mirror.on_config(body.set)
    tasks = [asyncio.create_task(mirror.run()), asyncio.create_task(keeper.run())]
    try:
        async with asyncio.timeout(60):
            while [bool(config.status.conditions) for config in mirror.configs.values()] != [True] * 3:
                await body.wait()
                body.clear()
        header, *rows = kubectl("get", "bkoidc", "-n", namespace).splitlines()
        assert " ".join(header.split()) == "NAME ISSUER AUDIENCE ENABLED READY AGE"
        assert [row.split()[:-1] for row in rows] == [
            ["away", "https://away.example.com", "a", "true", "false"],
            ["good", ISSUER, "a", "true", "true"],
            ["open", "https://gitlab.com", "a", "true", "false"],
        ]
        status = (await api.get(paths.custom(OIDCConfig.PLURAL, namespace, "good")))["status"]
        assert (status["message"], status["observedGeneration"]) == ("2 keys", 1)
        assert {one["type"]: (one["status"], one["message"]) for one in status["conditions"]} == {
            "IgnoredFields": ("True", "spec.clientSecretRef"),
            "Ready": ("True", "2 keys"),
        }
        kubectl("wait", "--for=condition=Ready", "bkoidc/good", "-n", namespace, "--timeout=60s")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
