"""How a starting appliance reports to the command line. It only names the type that the other modules pass on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

StartupReporter = Callable[[dict[str, Any]], None]
"""Receives {"progress": text} any number of times while the appliance starts, then once the content of
`appliance.json`."""
