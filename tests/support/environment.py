"""Keeps the settings of a developer's own appliance out of the tests, which inherit their shell's environment.

It never touches the variables that choose what is tested.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

OF_THE_TESTS = (
    "BKPOOL_BRIEF",
    "BKPOOL_CI",
    "BKPOOL_E2E_",
    "BKPOOL_PYTHON",
    "BKPOOL_ROUNDS",
    "BKPOOL_SOAK",
    "BKPOOL_ZIPAPP",
)
"""Beginnings of the names that choose what is tested. `scripts/test` has the same list."""


def forget_settings(environment: MutableMapping[str, str] = os.environ) -> None:
    """Removes every BKPOOL_* and BKCTL_* variable that is a setting of bkpool, also the place of its cache."""
    for name in list(environment):
        if name.startswith(("BKPOOL_", "BKCTL_")) and not name.startswith(OF_THE_TESTS):
            del environment[name]
