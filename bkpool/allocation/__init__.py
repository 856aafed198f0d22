"""Leases: wait for a worker, claim it, renew the lease, release or revoke it.

A lease is `spec.allocation` of a worker and changes by compare-and-swap only, so any number of replicas may do this
at the same time. Who is served next is decided in `core.queueing`. The controller starts workers and removes leases
that have ended; this room does not.
"""

from bkpool.allocation.allocator import Allocator
from bkpool.allocation.caller_limits import CallerLimits
from bkpool.allocation.deliveries import Delivery, Receipt
from bkpool.allocation.leases import LeaseService, OwnLease
from bkpool.allocation.orders import AllocationRequest, Grant, Offer
from bkpool.allocation.pool_removal import PoolRemover
from bkpool.allocation.revocation import LeaseSelector, Revocation, Revoker

__all__ = [
    "AllocationRequest",
    "Allocator",
    "CallerLimits",
    "Delivery",
    "Grant",
    "LeaseSelector",
    "LeaseService",
    "Offer",
    "OwnLease",
    "PoolRemover",
    "Receipt",
    "Revocation",
    "Revoker",
]
