"""Leases: claiming a worker, waiting for it, renewing, releasing.

A lease is `spec.allocation` of a worker and changes by compare-and-swap only, so any number of replicas may do this
at once. What brings workers up and ends leases by time is the controller; nothing here starts or stops one.
"""

from bkpool.allocation.claims import AllocationRequest, Claims, Grant
from bkpool.allocation.leases import Leases, Own
from bkpool.allocation.limits import Limits

__all__ = ["AllocationRequest", "Claims", "Grant", "Leases", "Limits", "Own"]
