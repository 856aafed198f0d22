"""The sections of the settings about workers and about the clusters that they run in.

`bkpool.settings.model` says what belongs into a setting.
"""

from __future__ import annotations

from bkpool.core.names import SYSTEM_NAMESPACE
from bkpool.settings.fields import Section, seconds, setting
from bkpool.settings.kinds import Duration, Files, OptionalFile, OptionalText, Text, Texts


class WorkersSettings(Section):
    """The buildkitd daemons."""

    buildkit_image: OptionalText = setting(
        None,
        "The image of workers that are pods, where their pool names none.",
        option="--buildkit-image",
        metavar="IMAGE",
        unset="the one that this release names",
    )


class KindSettings(Section):
    """The kind cluster that bkpool makes (backend `kind`)."""

    cluster: Text = setting("bkpool", "The name of the kind cluster.", option="--cluster", metavar="NAME")
    node_image: OptionalText = setting(
        None,
        "The image of the cluster's node.",
        option="--node-image",
        metavar="IMAGE",
        unset="the one that belongs to this kind",
    )
    image_archives: Files = setting(
        (),
        "Archives made by `docker save`, to load into the cluster where it can pull no images.",
        option="--image-archive",
        remembered=False,
    )


class KubernetesSettings(Section):
    """The cluster (backends `kind` and `kubernetes`).

    In a cluster the controller passes the times of this section, except leader_lease, on to the gateways of its
    pools.
    """

    kubeconfig: OptionalFile = setting(
        None, "The kubeconfig of the cluster (backend `kubernetes`).", option="--kubeconfig", unset="as kubectl"
    )
    context: OptionalText = setting(
        None, "The context in the kubeconfig.", option="--context", metavar="NAME", unset="its current context"
    )
    namespace: Text = setting(
        SYSTEM_NAMESPACE, "The namespace of the appliance itself.", option="--namespace", metavar="NAME"
    )
    pool_namespaces: Texts = setting(
        (), "Namespaces that may have pools.", option="--pool-namespace", unset="every namespace"
    )
    image: OptionalText = setting(
        None,
        "The image of bkpool, for the gateways of pools in a cluster.",
        option="--image",
        metavar="IMAGE",
        unset="the one of this release",
    )
    connect_timeout: Duration = setting(
        seconds(5),
        "How long the API server may take to accept a connection. If it is too short for the way to the cluster, "
        "nothing can be leased there. If it is long, each request waits so long for an address that does not answer.",
        between=(seconds(0.5), seconds(60)),
    )
    request_timeout: Duration = setting(
        seconds(15),
        "How long one request to the API server may take. If it is too short for a busy API server, leases fail with "
        '"does not answer". If it is long, a caller waits so long for an API server that is gone.',
        between=(seconds(1), seconds(60)),
    )
    idle_timeout: Duration = setting(
        seconds(60),
        "How long an idle connection to the API server is kept. If a proxy in between closes connections earlier, "
        "set less than it does: otherwise requests fail now and then. If it is short, each request needs a new TLS "
        "handshake. The API server itself closes them after 90s.",
        between=(seconds(1), seconds(85)),
    )
    watch_duration: Duration = setting(
        seconds(240),
        "How long one watch is kept open, and up to a quarter more. If a load balancer cuts connections earlier, set "
        "less than it does: otherwise bkpool lists everything again after each cut. If it is short, the API server "
        "gets more requests.",
        between=(seconds(30), seconds(3600)),
    )
    watch_silence: Duration = setting(
        seconds(100),
        "After so long without a byte a watch is given up and everything is listed again. If it is long, changes may "
        "go unnoticed for so long when the network fails without a word.",
        between=(seconds(75), seconds(3600)),
        lowest_because="an API server that has nothing to report sends a bookmark about every 60s",
    )
    leader_lease: Duration = setting(
        seconds(15),
        "How long the Lease of the replica that runs the controller is valid; the replica renews it three times in "
        "this time. If it is too short for a busy API server, the controller moves from replica to replica. If it is "
        "long, nobody starts workers for so long after that replica's machine has failed. Replicas may differ while "
        "a new value is rolled out.",
        between=(seconds(6), seconds(300)),
    )
