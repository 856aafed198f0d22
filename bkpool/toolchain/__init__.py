"""Finds or gets the programs that bkpool runs: buildkitd, buildctl, buildx, runc, rootlesskit, kind.

It uses a program on PATH that is new enough, else the one in bkpool's cache, else a verified download of the pinned
release, else a build with Go from the module in the package. It never runs an unverified or incomplete program.
"""

from bkpool.toolchain.progress import ReportProgress
from bkpool.toolchain.resolver import Found, Toolchain, default_cache
from bkpool.toolchain.table import Tool

__all__ = ["Found", "ReportProgress", "Tool", "Toolchain", "default_cache"]
