"""Which addresses a worker may connect to: the special networks that `spec.networking.egress` speaks of.

Pure facts, for pods and processes alike. What enforces them is in `workers`.
"""

from __future__ import annotations

# Networks that are not globally reachable by the IANA special-purpose address registries (RFC 6890), and multicast.
# NAT64's 64:ff9b::/96 is not one of them: it is for public addresses only (RFC 6052 section 3.1).
NOT_PUBLIC_4 = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/3",
)
NOT_PUBLIC_6 = (
    "::/80",  # with IPv4-mapped addresses: the API server refuses ::ffff:0:0/96 as an IPv6 network
    "64:ff9b:1::/48",
    "100::/64",
    "2001::/23",
    "2001:db8::/32",
    "2002::/16",
    "fc00::/7",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
)
"""What `public` leaves out."""

NEVER_BY_DEFAULT = (
    "0.0.0.0/8",  # this host (RFC 1122)
    "169.254.0.0/16",  # link-local, and the metadata services of nearly all clouds
    "100.100.100.200/32",  # metadata of Alibaba Cloud
    "168.63.129.16/32",  # the platform address of Azure
    "192.0.0.192/32",  # metadata of Oracle's classic cloud
    "224.0.0.0/4",  # multicast reaches programs of the host that listen to a group
    "255.255.255.255/32",
    "fe80::/10",
    "fd00:ec2::254/128",  # metadata of AWS over IPv6
    "fd20:ce::254/128",  # metadata of Google Cloud over IPv6
    "ff00::/8",
)
"""What no policy opens, unless `spec.networking.egress.allowedCIDRs` has exactly this network or a part of it."""
