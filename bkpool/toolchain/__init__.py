"""Finds or gets the programs that bkpool runs: buildkitd, buildctl, buildx, runc, rootlesskit, kind.

From PATH where new enough, else from bkpool's cache, else a verified download of the pinned release, else built by Go
from the module that the package carries. Nothing unverified, half-made or unasked-for is ever run.
"""

from bkpool.toolchain.resolver import Found, ReportProgress, Toolchain, default_cache
from bkpool.toolchain.table import Tool

__all__ = ["Found", "ReportProgress", "Tool", "Toolchain", "default_cache"]
