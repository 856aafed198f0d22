"""Configures the log of a process."""

from __future__ import annotations

import logging
import sys

import structlog

from bkpool.gateway.net.tls_context import ignore_invalid_server_names


def configure_logging() -> None:
    """Writes readable lines on a terminal and JSON into a pipe. Debug messages are left out."""
    on_terminal = sys.stderr.isatty()
    sys.unraisablehook = ignore_invalid_server_names
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if on_terminal else structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
