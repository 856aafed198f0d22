"""The committed stubs are what the generator makes of control.proto."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bkpool.buildkit.stubs import control_pb2 as pb

pytestmark = [pytest.mark.any_python, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
STUBS = Path("bkpool/buildkit/stubs")


@pytest.mark.parametrize("name", ["control_pb2.py", "control_pb2.pyi", "control_grpc.py"])
def test_they_are_generated_from_the_proto_file(tmp_path, name):
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT)]
    options = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpclib_python")]
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"  # where grpclib's plugin is
    subprocess.run([*command, *options, str(ROOT / STUBS / "control.proto")], check=True, env={"PATH": path})
    assert (tmp_path / STUBS / name).read_text() == (ROOT / STUBS / name).read_text(), "run nox -s stubs"


def test_what_may_hold_a_secret_is_not_read():
    names = set(pb.BuildHistoryRecord.DESCRIPTOR.fields_by_name)
    assert not names & {"FrontendAttrs", "ExporterResponse", "Exporters"}
