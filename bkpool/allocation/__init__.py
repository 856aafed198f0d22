"""Leases: claiming a worker, waiting for it, renewing, releasing.

A lease is `spec.allocation` of a worker and changes by compare-and-swap only, so any number of replicas may do this
at once. What brings workers up and ends leases by time is the controller; nothing here starts or stops one.
"""

from bkpool.allocation.allocator import AllocationRequest, Allocator, Grant
from bkpool.allocation.caller_limits import CallerLimits
from bkpool.allocation.leases import LeaseService, OwnLease

__all__ = ["AllocationRequest", "Allocator", "CallerLimits", "Grant", "LeaseService", "OwnLease"]
