"""The composition root: opens the other rooms in order, and closes them in order.

`entry.run` starts a process. It has the roles API, controller and gateway, or some of them in a cluster; `roles`
opens each. This room decides nothing about leases or workers.
"""

from bkpool.appliance.cleanup import purge, stop_leftover_workers
from bkpool.appliance.entry import run
from bkpool.appliance.run_options import RunOptions

__all__ = ["RunOptions", "purge", "run", "stop_leftover_workers"]
