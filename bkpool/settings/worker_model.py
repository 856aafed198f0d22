"""The sections of the settings about workers and about the clusters that they run in.

`bkpool.settings.model` says what belongs in a setting.
"""

from __future__ import annotations

from datetime import timedelta

from bkpool.core.names import SYSTEM_NAMESPACE
from bkpool.settings.fields import Section, seconds, setting
from bkpool.settings.kinds import (
    Count,
    DiskSize,
    Duration,
    Files,
    Name,
    Names,
    OptionalFile,
    OptionalText,
    Switch,
    Text,
)


class WorkersSettings(Section):
    """The buildkitd daemons."""

    buildkit_image: OptionalText = setting(
        None,
        "The image of workers that are pods, where their pool names none.",
        option="--buildkit-image",
        metavar="IMAGE",
        unset="BuildKit's own image, in the version of this release",
    )
    host_network: Switch = setting(
        False,
        "Workers use the network of this machine instead of one of their own each (backend `process`). Every build "
        "then reaches what listens on this machine, other builds and the machine's cloud identity.",
        option="--host-network",
    )
    gc_keep_storage: DiskSize = setting(
        "10GB",
        "The largest size of a worker's cache, where the pool's `cache.gc.keepStorage` says nothing. If it is small, "
        "builds find less in their cache. If it is large, the caches of all workers of a machine may fill its disk. "
        "This and the next three take effect when a worker is started.",
    )
    gc_reserved_space: DiskSize = setting(
        "1GB",
        "A size up to which nothing is deleted, where the pool gives neither `cache.gc.reservedSpace` nor "
        "`keepStorage`. If it is small, a worker may lose its most used layers when the disk is full. If it is "
        "large, a full disk stays full.",
    )
    gc_min_free_space: DiskSize = setting(
        "5GB",
        "How much of the disk stays free, where the pool's `cache.gc.minFreeSpace` says nothing. If it is small, "
        "builds may fail because the disk is full. If it is more than is free, caches shrink to their reserve.",
    )
    gc_keep_duration: Duration = setting(
        seconds(0),
        "How long unused data of a cache is kept, where the pool's `cache.gc.keepDuration` says nothing. 0s: the "
        "age does not matter. If it is short, builds find less in their cache. If it is long, old data fills the "
        "cache up to its size.",
        between=(seconds(0), timedelta(days=365)),
    )
    start_timeout: Duration = setting(
        seconds(60),
        "How long buildkitd may take to answer after it was started; half a second is usual. If it is too short for "
        "a slow disk, starts fail and are repeated. If it is long, a daemon that hangs is noticed late.",
        between=(seconds(1), timedelta(hours=1)),
    )
    concurrent_starts: Count = setting(
        4,
        "How many buildkitd processes may start at once (backend `process`). If it is large, all of them start "
        "slowly on a small machine. If it is small, callers wait for each other.",
        between=(1, 1000),
    )
    adopt_timeout: Duration = setting(
        seconds(5),
        "How long a buildkitd process of an earlier run may take to answer (backend `process`). If it is too short "
        "for a busy disk, a new `up` ends the process with its builds. If it is long, `up` waits that long for a "
        "daemon that hangs.",
        between=(seconds(1), seconds(600)),
    )
    stop_timeout: Duration = setting(
        seconds(10),
        "How long a buildkitd process may take to end before it is killed (backend `process`). If it is too short "
        "for a slow disk, a cache may be damaged. If it is long, a daemon that hangs blocks its slot for that long.",
        between=(seconds(1), seconds(600)),
    )
    log_size: Count = setting(
        5 * 1024 * 1024,
        "The largest size of the log of a buildkitd process; as much of its earlier part is kept, and of the log of "
        "the run before (backend `process`). If it is small, the cause of a failure may be missing. If it is large, "
        "the logs of many workers take much of the disk.",
        between=(64 * 1024, 1024 * 1024 * 1024),
        unit="bytes",
    )
    pod_scheduling_timeout: Duration = setting(
        timedelta(minutes=10),
        "How long a pod may wait for a node. If it is too short for the cluster's autoscaler, starts fail although a "
        "node is on its way. If it is long, callers learn late that there is no room.",
        between=(seconds(5), timedelta(hours=24)),
    )
    pod_pull_timeout: Duration = setting(
        timedelta(minutes=2),
        "How long a pod is kept after its image could not be pulled for the first time; the kubelet tries again "
        "meanwhile. If it is short, a registry that is away for a moment makes starts fail. If it is long, callers "
        "learn late that the name of an image is wrong.",
        between=(seconds(5), timedelta(hours=24)),
    )
    pod_creation_timeout: Duration = setting(
        timedelta(minutes=10),
        "How long a pod that has a node may take until its container starts: volumes are attached and the image is "
        "pulled. If it is too short for a slow registry, starts fail. If it is long, a volume that cannot be "
        "attached is noticed late.",
        between=(seconds(5), timedelta(hours=24)),
    )
    pod_deletion_timeout: Duration = setting(
        timedelta(minutes=1),
        "How long a pod or a volume may take to be deleted before a start that waits for it fails. If it is too "
        "short for the cluster's storage, such starts fail and are repeated. If it is long, a node that is gone is "
        "noticed late.",
        between=(seconds(5), timedelta(hours=1)),
    )


class KindSettings(Section):
    """The kind cluster that bkpool makes (backend `kind`)."""

    cluster: Text = setting("bkpool", "The name of the kind cluster.", option="--cluster", metavar="NAME")
    node_image: OptionalText = setting(
        None,
        "The image of the cluster's node.",
        option="--node-image",
        metavar="IMAGE",
        unset="the node image of the kind program that is used",
    )
    ready_timeout: Duration = setting(
        timedelta(minutes=2),
        "How long the node of the cluster may take to become ready. If it is too short for a slow machine, `up` "
        "fails, or begins before the cluster works. If it is long, `up` waits that long for a cluster that is "
        "broken.",
        between=(seconds(10), timedelta(hours=1)),
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
        None,
        "The kubeconfig of the cluster (backend `kubernetes`).",
        option="--kubeconfig",
        unset="the file that kubectl uses",
    )
    context: OptionalText = setting(
        None,
        "The context in the kubeconfig.",
        option="--context",
        metavar="NAME",
        unset="the current context of the kubeconfig",
    )
    namespace: Name = setting(SYSTEM_NAMESPACE, "The namespace of the appliance itself.", option="--namespace")
    pool_namespaces: Names = setting(
        (),
        "Namespaces that may have pools. In a cluster the appliance sees pools, workers and leases nowhere else.",
        option="--pool-namespace",
        unset="every namespace",
    )
    image: OptionalText = setting(
        None,
        "The image of bkpool, for the gateways of pools in a cluster.",
        option="--image",
        metavar="IMAGE",
        unset="bkpool's image of this release",
    )
    connect_timeout: Duration = setting(
        seconds(5),
        "How long the API server may take to accept a connection. If it is too short for the way to the cluster, "
        "nothing can be leased there. If it is long, each request waits that long for an address that does not "
        "answer.",
        between=(seconds(0.5), seconds(60)),
    )
    request_timeout: Duration = setting(
        seconds(15),
        "How long one request to the API server may take. If it is too short for a busy API server, leases fail with "
        '"does not answer". If it is long, a caller waits that long for an API server that is gone.',
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
        "A watch that gets no byte for this long is given up, and everything is listed again. If it is long, changes "
        "may go unnoticed for that long when the network fails without a word.",
        between=(seconds(75), seconds(3600)),
        lowest_because="an API server that has nothing to report sends a bookmark about every 60s",
    )
    leader_lease: Duration = setting(
        seconds(15),
        "How long the Lease of the replica that runs the controller is valid; the replica renews it three times in "
        "this time. If it is too short for a busy API server, the controller moves from replica to replica. If it is "
        "long, nobody starts workers for that long after that replica's machine has failed. Replicas may differ "
        "while a new value is rolled out.",
        between=(seconds(6), seconds(300)),
    )
