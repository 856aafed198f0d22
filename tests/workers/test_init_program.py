"""The program of a worker's first process is whole whenever a worker is started."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bkpool.core.pool import PoolSpec
from bkpool.workers.processes.init_program import InitProgram


def prepared(runtime_dir: Path, worker: str) -> Path:
    """Prepares a worker. Returns where the program is, which all workers share."""
    (runtime_dir / worker).mkdir()
    command = InitProgram(None, {}, frozenset).command(runtime_dir / worker / "init", PoolSpec())
    return Path(command[-2])


@pytest.mark.parametrize("part", ["__main__.py", "worker_init/program.py", "worker_init"])
def test_what_somebody_has_removed_is_made_again(tmp_path, part):
    """As by an rm -rf of the runtime directory that is under way."""
    program = prepared(tmp_path, "one")
    whole = sorted(path.relative_to(program) for path in program.rglob("*"))
    shutil.rmtree(program / part) if (program / part).is_dir() else (program / part).unlink()
    assert prepared(tmp_path, "two") == program
    assert sorted(path.relative_to(program) for path in program.rglob("*")) == whole
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", program.name}, "nothing else is left"
