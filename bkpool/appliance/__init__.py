"""The composition root: what starts in which order, and what drains in which order.

One process holds all three roles (controller, api, gateway) on the process backend. It wires the rooms together; it
decides nothing about leases or workers.
"""

from bkpool.appliance.entry import purge, run, sweep
from bkpool.appliance.settings import Settings

__all__ = ["Settings", "purge", "run", "sweep"]
