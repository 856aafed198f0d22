"""The GitHub Action installs what its commit names, and nothing that a package index could have changed since."""

import re
from pathlib import Path

import pytest
import yaml
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.any_python

ROOT = Path(__file__).parents[1]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
LOCK = ROOT / "requirements-install.lock"


@pytest.fixture(scope="module")
def script():
    (step,) = [step for step in ACTION["runs"]["steps"] if step["name"] == "Install bkpool"]
    assert step["env"] == {"SOURCE": "${{ github.action_path }}"}
    return step["run"]


def pip_calls(script):
    """The arguments of each call of pip, which goes through one shell function."""
    (definition,) = re.findall(r"^install\(\) { (.*); }$", script, re.MULTILINE)
    assert definition.startswith('"$RUNNER_TEMP/bkpool/bin/python" -I -m pip install ')
    assert script.count("pip") == definition.count("pip")
    return [line.split()[1:] for line in script.splitlines() if line.startswith("install ")]


def test_dependencies_come_with_hashes_and_bkpool_from_the_actions_own_source(script):
    assert pip_calls(script) == [
        ["--require-hashes", "--only-binary", ":all:", "--requirement", '"$SOURCE/requirements-install.lock"'],
        ["--no-index", "--no-deps", "--no-build-isolation", '"$SOURCE"'],
    ]
    assert "version" not in ACTION["inputs"], "no version of an index is installed"


def test_no_module_of_the_workspace_is_read(script):
    assert all(" -I " in line for line in script.splitlines() if "python" in line.partition(" ")[0])


def test_every_line_of_the_lock_has_a_hash_and_none_is_bkpool():
    entries = re.split(r"^(?=[A-Za-z0-9])", LOCK.read_text(), flags=re.MULTILINE)
    names = {canonicalize_name(entry.partition("==")[0]) for entry in entries if "==" in entry}
    assert all("--hash=sha256:" in entry for entry in entries if "==" in entry)
    assert {"aiohttp", "hatchling"} <= names, "what runs, and what makes the package"
    assert names.isdisjoint({"bkpool", "bkctl"})


def test_both_actions_leave_the_audience_to_the_appliance():
    lease = yaml.safe_load((ROOT / "actions" / "lease" / "action.yml").read_text())
    assert ACTION["inputs"]["audience"]["default"] == lease["inputs"]["audience"]["default"] == ""
