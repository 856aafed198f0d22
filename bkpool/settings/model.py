"""Every setting of an appliance, by section, with its default, its bounds and what it is for.

The longest sections have modules of their own. docs/configuration.md is written from all of them. A number stays a
constant in its room, and is missing here, where another value would break a rule (docs/rules.md) or only make sense
together with changed code.
"""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict

from bkpool.core.names import API_PORT, DEV_ISSUER_PORT, METRICS_PORT
from bkpool.settings import kinds
from bkpool.settings.allow_model import AllowSettings
from bkpool.settings.fields import Section, seconds, setting
from bkpool.settings.gateway_model import GatewaySettings
from bkpool.settings.kinds import (
    Address,
    Count,
    Duration,
    Listen,
    OptionalFile,
    OptionalText,
    OptionalUrl,
    Switch,
)
from bkpool.settings.worker_model import KindSettings, KubernetesSettings, WorkersSettings


class Role(StrEnum):
    """What one process of an appliance does. On a single machine one process does it all."""

    API = "api"
    CONTROLLER = "controller"
    GATEWAY = "gateway"


ALL_ROLES = frozenset(Role)


class ApiSettings(Section):
    """The HTTP API that leases workers."""

    address: Listen = setting(Address("127.0.0.1", API_PORT), "Where the API listens.", option="--api-address")
    external_url: OptionalUrl = setting(
        None,
        "The URL at which callers reach the API, as they write it in BKCTL_ENDPOINT. ID tokens must then be made for "
        "it (`identity.audience`), so that a token for another installation is of no use here.",
        option="--external-url",
        unset="installations that accept tokens of the same issuer can use each other's tokens",
    )
    tls: Switch = setting(
        False, "Serve the API over TLS, with a certificate of bkpool's own authority.", option="--api-tls"
    )
    cert: OptionalFile = setting(
        None,
        "Serve the API over TLS with this certificate (PEM, with its chain). bkpool reads it again when it changes.",
        option="--api-cert",
    )
    key: OptionalFile = setting(None, "The key of the certificate (PEM).", option="--api-key")
    plain_http: Switch = setting(
        False, "Allow the API without TLS on an address that other machines can reach.", option="--plain-http"
    )
    max_body: Count = setting(
        64 * 1024,
        "The largest request body that the API reads; a larger one gets 413. Raise it if callers send much "
        "metadata. If it is large, each request may take that much memory.",
        between=(32 * 1024, 16 * 1024 * 1024),
        unit="bytes",
    )
    body_timeout: Duration = setting(
        seconds(30),
        "How long a request body may take to arrive. If it is too short for a slow network, its callers get 400. If "
        "it is long, a caller who sends nothing keeps a connection open for that long.",
        between=(seconds(1), seconds(600)),
    )
    connections: Count = setting(
        4096,
        "Open connections. One more closes one that has no request: the oldest of the address that has most of them. "
        "If all have a request, it is closed itself. If it is small, callers who wait for a worker take all of them. "
        "If it is large, memory may run out. The limit of file descriptors may allow fewer; the log says how many.",
        between=(16, 100_000),
    )
    connections_per_address: Count = setting(
        1024,
        "Open connections of one address, or of one IPv6 network of 64 bits. One more closes the oldest one of that "
        "address that has no request. Raise it if many callers come through one proxy. If it is large, one client "
        "can take all connections.",
        between=(16, 100_000),
    )
    header_timeout: Duration = setting(
        seconds(10),
        "From accepting a connection to the end of the header of its first request. If it is too short for a slow "
        "network, clients are cut off. If it is long, clients that ask for nothing keep connections open for longer.",
        between=(seconds(1), seconds(120)),
    )
    idle_timeout: Duration = setting(
        seconds(120),
        "How long a connection may stay open after an answer without another request. It must be longer than a proxy "
        "before the API keeps its connections, or some of its requests fail. If it is long, idle clients keep "
        "connections open for longer.",
        between=(seconds(1), seconds(3600)),
    )
    max_wait: Duration = setting(
        timedelta(hours=1),
        "The longest `wait` of an allocate request; a caller who asks for more gets 400. One who names no `wait` "
        "waits for 5m, or for this if it is less. If a proxy before the API ends requests that take long, set less "
        "than it does: then callers learn why they got no worker. If it is short, callers ask again and lose their "
        "place in the queue.",
        between=(seconds(1), timedelta(hours=24)),
    )


class CertificateSettings(Section):
    """The certificates of gateways and of the API that bkpool issues.

    A change applies to those that are issued from then on.
    """

    server_life: Duration = setting(
        timedelta(days=365),
        "How long such a certificate is valid. It is issued again 30 days before its end, or in the last third if "
        "that is shorter; connections and clients do not notice. If it is short, it is issued often, and a gateway "
        "that gets no new one for that long cannot be reached. If it is long, a stolen key is of use for longer.",
        between=(timedelta(days=2), timedelta(days=3650)),
    )


class MetricsSettings(Section):
    """What Prometheus reads, and when an event loop counts as blocked.

    In a cluster the controller passes this section, except the address, on to the gateways of its pools.
    """

    address: Listen = setting(
        Address("127.0.0.1", METRICS_PORT), "Where `/metrics` is served.", option="--metrics-address"
    )
    worker_series: Count = setting(
        200,
        "How many workers have a series of their own in `buildkit_gateway_open_connections`: those with the most "
        "connections. The others of a pool share one. If it is small, most leases cannot be told apart. If it is "
        "large, Prometheus stores many series.",
        between=(0, 10_000),
    )
    loop_timeout: Duration = setting(
        seconds(0.25),
        "An event loop that runs nothing for this long counts as blocked, and a warning names the code. If it is too "
        "short for a slow or shared machine, such warnings say nothing about bkpool. If it is long, short blockages "
        "go unnoticed.",
        between=(seconds(0.05), seconds(10)),
    )


class ControllerSettings(Section):
    """The controller that starts, watches and removes workers."""

    max_failures: Count = setting(
        5,
        "After this many failed starts in a row the lease ends with an error. If it is small, a short fault ends "
        "leases. If it is large, callers learn late that a worker cannot start.",
        between=(1, 100),
    )
    stable_after: Duration = setting(
        seconds(60),
        "The failures of a worker are counted from 0 again after it has run for this long. If it is short, a worker "
        "that fails regularly is started for ever. If it is long, faults that have nothing to do with each other "
        "end a lease.",
        between=(seconds(1), seconds(3600)),
    )
    backoff: Duration = setting(
        seconds(0.5),
        "Pause before the second start of a worker that failed. It doubles each time. If it is short, a worker that "
        "cannot start costs much processor time. If it is long, a lease waits long after a chance fault.",
        between=(seconds(0.05), seconds(600)),
    )
    backoff_max: Duration = setting(
        seconds(120),
        "The longest such pause. If it is short, workers that cannot start are tried often. If it is long, bkpool "
        "notices late that the cause is gone.",
        between=(seconds(0.05), seconds(3600)),
    )


class AllocationSettings(Section):
    """The queue of callers that wait for a worker."""

    max_waiters: Count = setting(
        1000,
        "Requests that may wait for one pool. One more is refused at once. If it is small, callers are refused "
        "although a worker will soon be free. If it is large, that many requests take up memory and connections.",
        between=(1, 100_000),
    )


class IdentitySettings(Section):
    """How callers are recognised."""

    audience: OptionalText = setting(
        None,
        "The audience that callers' tokens must have: those of ServiceAccounts, and those of issuers whose "
        "configuration names no audience. If it changes, jobs that ask for a fixed audience must ask for another.",
        unset="`api.external_url`, or buildkit-controller if that is not set either",
    )
    issuer_timeout: Duration = setting(
        seconds(5),
        "How long an issuer may take to answer with its keys. If it is too short for a slow issuer, its callers get "
        "503. If it is long, they wait that long for an issuer that is gone.",
        between=(seconds(0.5), seconds(60)),
    )
    keys_fresh: Duration = setting(
        seconds(600),
        "How long the keys of an issuer are used before they are fetched again. If it is short, the issuer is asked "
        "often. If it is long, a key that the issuer has withdrawn is accepted for that long.",
        between=(seconds(10), seconds(86_400)),
    )
    keys_stale: Duration = setting(
        seconds(3600),
        "How long they are used while the issuer does not answer. If it is short, its callers are refused soon "
        "after it has failed. If it is long, a withdrawn key is accepted for that long.",
        between=(seconds(10), seconds(7 * 86_400)),
    )
    secret_fresh: Duration = setting(
        seconds(10),
        "How long the tokens of a pool are used before their Secret is read again. If it is short, the API server "
        "gets more requests. If it is long, a token that you remove still opens the pool for that long.",
        between=(seconds(0), seconds(3600)),
    )
    secret_timeout: Duration = setting(
        seconds(5),
        "How long the cluster may take to give the Secret with the tokens of a pool. If it is too short for a busy "
        "API server, callers with such tokens get 503. If it is long, they wait for that long.",
        between=(seconds(0.5), seconds(60)),
    )
    clock_leeway: Duration = setting(
        seconds(30),
        "By how much the clocks of an issuer and of this machine may differ. If it is less than they do, fresh "
        "tokens are refused. If it is long, a token works for that long after its end.",
        between=(seconds(0), seconds(300)),
    )
    token_review_timeout: Duration = setting(
        seconds(10),
        "How long the cluster may take to check the token of a ServiceAccount. If it is too short for a busy API "
        "server, callers with such tokens get 503. If it is long, they wait for that long.",
        between=(seconds(0.5), seconds(60)),
    )


class DevIssuerSettings(Section):
    """An issuer for trying out identities on one machine. It makes a token for anyone who asks."""

    enabled: Switch = setting(
        False, "Also run an issuer that makes a token for anyone who asks; for development.", option="--dev-issuer"
    )
    address: Listen = setting(
        Address("127.0.0.1", DEV_ISSUER_PORT), "Where this issuer listens.", option="--dev-issuer-address"
    )


class ApplianceSettings(Section):
    """The process as a whole: what it does, and how it ends."""

    roles: Annotated[frozenset[Role], kinds.ROLES] = setting(
        ALL_ROLES,
        "What this process does, in a cluster: api,controller or gateway.",
        option="--roles",
        remembered=False,
    )
    drain_timeout: Duration = setting(
        timedelta(minutes=10),
        "How long open builds may go on after SIGTERM or `down`. If it is short, they are cut. If it is long, "
        "`down` may take that long.",
        between=(seconds(0), timedelta(days=7)),
        option="--drain-timeout",
    )
    release_grace: Duration = setting(
        seconds(1),
        "How long the API still answers after the last build of a drain, so that its lease can be released. If it "
        "is too short, such leases remain until they expire. If it is long, `down` takes longer.",
        between=(seconds(0), seconds(60)),
    )
    endpoint_removal_delay: Duration = setting(
        seconds(5),
        "How long a replica in a cluster still accepts connections after SIGTERM. In a large cluster, every "
        "kube-proxy has removed the replica after about 5s. If it is too short, clients reach a replica that has "
        "ended. If it is long, a rollout takes longer.",
        between=(seconds(0), seconds(120)),
    )
    log_size: Count = setting(
        10 * 1024 * 1024,
        "The largest size of `logs/appliance.log`, the log of an appliance in the background. A larger one is "
        "renamed, and four older ones are kept. If it is small, the log shows the last hours only. If it is large, "
        "it takes five times as much of the disk.",
        between=(64 * 1024, 1024 * 1024 * 1024),
        unit="bytes",
    )


class Settings(BaseModel):
    """All settings. The names of the fields are the sections of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    api: ApiSettings = ApiSettings()
    gateway: GatewaySettings = GatewaySettings()
    certificates: CertificateSettings = CertificateSettings()
    metrics: MetricsSettings = MetricsSettings()
    controller: ControllerSettings = ControllerSettings()
    allocation: AllocationSettings = AllocationSettings()
    identity: IdentitySettings = IdentitySettings()
    workers: WorkersSettings = WorkersSettings()
    kind: KindSettings = KindSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()
    allow: AllowSettings = AllowSettings()
    dev_issuer: DevIssuerSettings = DevIssuerSettings()
    appliance: ApplianceSettings = ApplianceSettings()
