"""The allocation API: thin routes over the lease service.

It checks what comes in, says who is calling and whether they may, and writes answers, errors and the audit trail. It
decides nothing about leases.
"""

from bkpool.api.app import make_app
from bkpool.api.service import Service
from bkpool.api.serving import open_runner

__all__ = ["Service", "make_app", "open_runner"]
