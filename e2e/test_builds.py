"""Builds through the gateway: the usual ways to use a lease."""

from __future__ import annotations

import pytest

from harness import only_on, really_ran, run


@pytest.fixture
def lease(appliance):
    certificates = appliance.allocate()
    yield certificates
    appliance.release(certificates.lease).ok()
    appliance.all_idle()


def test_a_run_step_really_runs_and_the_second_build_is_cached(appliance, lease, context, tmp_path):
    path = context.dockerfile("say hello-from-a-worker", "write /out made")
    builder = appliance.builder(lease, "twice")
    first = appliance.build(builder, path, "--output", f"type=local,dest={tmp_path / 'out'}").ok()
    assert really_ran(first, "hello-from-a-worker")
    assert (tmp_path / "out" / "out").read_text() == "made"
    second = appliance.build(builder, path).ok()
    assert not really_ran(second, "hello-from-a-worker")


def test_the_build_command_leases_builds_and_releases(appliance, context, tmp_path):
    path = context.dockerfile("write /out made")
    for separator in ([], ["--"]):
        out = tmp_path / f"out{len(separator)}"
        appliance.cli("build", "--pool", "default", *separator, "--output", f"type=local,dest={out}", str(path)).ok()
        assert (out / "out").read_text() == "made"
    appliance.all_idle()
    assert appliance.pool()["allocated"] == 0


@only_on("process", "the command passes on what buildx returns, whatever worker that used")
def test_the_build_command_returns_the_exit_code_of_buildx(appliance, context):
    path = context.write('FROM scratch\nCOPY program /program\nRUN ["/program", "nonsense", "x"]\nCOPY absent /\n')
    failed = appliance.cli("build", str(path))
    assert failed.code == 1
    assert "absent" in failed.text
    appliance.all_idle()


def test_buildctl_builds_and_offers_alpn(appliance, lease, context, tools):
    path = context.dockerfile("say through-buildctl")
    result = run(
        *(tools["buildctl"], "--addr", f"tcp://localhost:{appliance.ports['gateway']}", *lease.buildctl, "build"),
        *("--progress", "plain", "--frontend", "dockerfile.v0", "--local", f"context={path}"),
        *("--local", f"dockerfile={path}"),
        env=appliance.env,
    ).ok()
    assert really_ran(result, "through-buildctl")


def test_two_buildx_commands_run_at_once_on_one_lease(appliance, lease, context):
    builder = appliance.builder(lease, "two")
    paths = [context.write(_dockerfile(n)) and _copy(context, n) for n in (1, 2)]
    running = [
        appliance.start("docker", "buildx", "build", "--builder", builder, "--progress", "plain", path)
        for path in paths
    ]
    for number, process in enumerate(running, 1):
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
        assert f"build-{number}" in out


def _dockerfile(number):
    return f'FROM scratch\nCOPY program /program\nRUN ["/program", "say", "build-{number}"]\n'


def _copy(context, number):
    target = context.path.with_name(f"context-{number}")
    target.mkdir()
    for file in context.path.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
        (target / file.name).chmod(0o755)
    return target


def test_twenty_builds_succeed_in_a_row_on_one_warm_worker(appliance, lease, context):
    builder = appliance.builder(lease, "row")
    path = context.dockerfile("say once")
    appliance.build(builder, path).ok()
    for _ in range(20):
        assert not really_ran(appliance.build(builder, path).ok(), "once")


def test_the_next_lease_of_the_same_caller_has_the_cache(appliance, context):
    path = context.dockerfile("say kept-over-leases")
    first = appliance.cli("build", "--progress", "plain", str(path)).ok()
    appliance.all_idle()
    second = appliance.cli("build", "--progress", "plain", str(path)).ok()
    assert [really_ran(build, "kept-over-leases") for build in (first, second)] == [True, False]
