"""The allocation API: thin routes over the lease service.

It checks what comes in, says who is calling, and writes answers and errors as JSON. It decides nothing about leases.
"""

from bkpool.api.app import Service, make_app

__all__ = ["Service", "make_app"]
