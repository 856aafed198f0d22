"""The HTTP API: thin routes over the lease service.

It checks request bodies, asks who is calling and what they may do, and writes responses, errors and the audit trail.
It decides nothing about leases.
"""

from bkpool.api.app import make_app
from bkpool.api.limits import ApiLimits, HttpLimits
from bkpool.api.metrics import ApiMetrics
from bkpool.api.server import listen, open_runner
from bkpool.api.service import Service

__all__ = ["ApiLimits", "ApiMetrics", "HttpLimits", "Service", "listen", "make_app", "open_runner"]
