"""The section of the settings that says what pools in a cluster may ask for.

`bkpool.core.allowances` says what each entry allows. It checks no pool.
"""

from __future__ import annotations

from bkpool.settings.fields import Section, setting
from bkpool.settings.kinds import AllowedHosts, AllowedImages, Names

_NOTHING = "nothing"


class AllowSettings(Section):
    """What pools in each namespace of a cluster may ask for (backend `kubernetes`).

    `bkpool manifests` has the same options. On kind everything is allowed: the cluster belongs to whoever runs `up`.
    """

    hosts: AllowedHosts = setting(
        (),
        "Hosts that may be in the certificates of the gateways of a namespace, beside the names of their Services.",
        option="--allow-host",
        unset=_NOTHING,
    )
    privileged: Names = setting(
        (),
        "Namespaces whose pools may have privileged workers. Who may write a pool there can be root on a node.",
        option="--allow-privileged",
        unset=_NOTHING,
    )
    images: AllowedImages = setting(
        (),
        "Images that pools of a namespace may name, as patterns. bkpool's own images are always allowed.",
        option="--allow-image",
        unset=_NOTHING,
    )
    load_balancers: Names = setting(
        (),
        "Namespaces whose pools may have a Service of the type LoadBalancer.",
        option="--allow-load-balancer",
        unset=_NOTHING,
    )
    annotations: Names = setting(
        (),
        "Namespaces whose pools may annotate their Service.",
        option="--allow-service-annotations",
        unset=_NOTHING,
    )
