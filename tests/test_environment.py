"""The tests do not depend on the settings in the developer's shell."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from support.environment import OF_THE_TESTS, forget_settings

SCRIPT = Path(__file__).parents[1] / "scripts" / "test"


def test_settings_are_forgotten_and_choices_of_tests_are_kept():
    environment = {
        "BKPOOL_CACHE": "/a",
        "BKCTL_TOKEN": "t",
        "BKPOOL_E2E_BACKEND": "kind",
        "BKPOOL_CI": "1",
        "PATH": "/b",
    }
    forget_settings(environment)
    assert environment == {"BKPOOL_E2E_BACKEND": "kind", "BKPOOL_CI": "1", "PATH": "/b"}


def test_no_setting_of_the_shell_reaches_a_test():
    left = [name for name in os.environ if name.startswith(("BKPOOL_", "BKCTL_"))]
    assert [name for name in left if not name.startswith(OF_THE_TESTS)] == []


def test_the_script_forgets_the_same_settings():
    text = SCRIPT.read_text()
    (kept,) = re.findall(r"^ +(BKPOOL_[^)]*)\) ;;$", text, re.MULTILINE)
    assert {name.strip().rstrip("*") for name in kept.split("|")} == set(OF_THE_TESTS)
    loop = text[text.index("for name in") : text.index("done\n") + len("done\n")]
    environment = {"PATH": os.environ["PATH"], "BKPOOL_CACHE": "/a", "BKCTL_TOKEN": "t", "BKPOOL_E2E_KEEP": "1"}
    command = ["bash", "-euc", loop + "compgen -e | grep ^BK"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["BKPOOL_E2E_KEEP"]
