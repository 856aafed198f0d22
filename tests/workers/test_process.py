from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import uvloop

from bkpool.core.errors import Conflict, HostFault, WorkerFailed
from bkpool.core.names import Slot
from bkpool.core.pool import Cache, CacheGC
from bkpool.home.runtime_directory import home_digest
from bkpool.toolchain.network_programs import NetworkPrograms
from bkpool.workers import DaemonState
from bkpool.workers.processes import process_table
from bkpool.workers.processes.daemon import Daemon
from bkpool.workers.processes.runtime import ProcessLimits, ProcessRuntime
from bkpool.workers.processes.sandbox import Binaries
from bkpool.workers.processes.slot_files import CacheRecord, SlotFiles
from support.objects import pool as a_pool
from support.processes import LONG_STEPS, freeze, steps_that_sleep, until_step_sleeps

pytestmark = pytest.mark.slow

SLOT = Slot("default", "default", 0)
POOL = a_pool()


async def no_report(message: str) -> None:
    raise AssertionError(f"a process waits for nothing, but reported: {message}")


def record(home: Path, slot: Slot = SLOT) -> dict[str, object]:
    return json.loads((home / "slots" / slot.namespace / slot.pool / str(slot.number) / "process.json").read_text())


def mounts() -> str:
    return Path("/proc/self/mountinfo").read_text()


def container_cgroups(home: Path) -> list[Path]:
    ours = re.compile(rf"/bkpool-{home_digest(home)}/[^/]+/buildkit/[^/]+$")
    return [Path(top) for top, _, _ in os.walk("/sys/fs/cgroup") if ours.search(top)]


def cgroups(home: Path) -> list[Path]:
    """The cgroups of the slots of a home."""
    ours = re.compile(rf"/bkpool-{home_digest(home)}/")
    return [Path(top) for top, _, _ in os.walk("/sys/fs/cgroup") if ours.search(top)]


def temporary(pid: int) -> Path:
    """Where a process puts its temporary files."""
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return Path(dict(entry.split("=", 1) for entry in variables if entry)["TMPDIR"]).resolve()


def is_there(path: Path) -> bool:
    return path.exists()


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}/exe").exists()


def processes_saying(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in arguments:
                found.append(arguments)
    return found


async def output(build) -> str:
    process = await build
    text = (await process.communicate())[0].decode()
    assert process.returncode == 0, text
    return text


async def in_mid_step(build, seconds: str) -> asyncio.subprocess.Process:
    """A build whose last step sleeps by now."""
    process = await build
    await until_step_sleeps(seconds)
    return process


async def test_a_cache_survives_its_worker_and_is_gone_for_another_owner(runtime, build):
    endpoint = await runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)
    assert "the step runs" in await output(build(endpoint))
    await runtime.daemons.stop(SLOT)
    assert runtime.daemons.observe() == {}
    assert runtime.caches.owners() == {SLOT: "anna"}

    endpoint = await runtime.daemons.start(SLOT, "uid-2", "anna", POOL, no_report)
    assert "CACHED" in await output(build(endpoint))

    endpoint = await runtime.daemons.start(SLOT, "uid-3", "bert", POOL, no_report)
    text = await output(build(endpoint))
    assert "the step runs" in text
    assert "CACHED" not in text
    assert runtime.daemons.observe()[SLOT].cache_owner == "bert"


async def test_what_a_daemon_leaves_beside_its_cache_goes_with_it(runtime, build, tmp_path):
    await output(build(await runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)))
    home, log = tmp_path / "home", SlotFiles(tmp_path / "home", SLOT).log
    assert temporary(record(home)["pid"]) == SlotFiles(home, SLOT).scratch
    (SlotFiles(home, SLOT).scratch / "of-anna").write_text("left by a kill")
    await runtime.daemons.stop(SLOT)
    await runtime.daemons.start(SLOT, "uid-2", "anna", POOL, no_report)
    assert not list(SlotFiles(home, SLOT).scratch.glob("of-*"))
    assert [file.exists() for file in (log, log.with_suffix(".log.1"))] == [True, True]
    with log.open("a") as file:
        file.write('process "of anna" did not complete')

    await runtime.daemons.start(SLOT, "uid-3", "bert", POOL, no_report)
    assert "of anna" not in log.read_text()
    assert not log.with_suffix(".log.1").exists()
    await runtime.caches.wipe(SLOT)
    assert not log.exists()


async def test_a_killed_daemon_is_seen_at_once_and_takes_its_containers_with_it(runtime, build, tmp_path):
    changed = asyncio.Event()
    runtime.daemons.on_change(lambda _slot: changed.set())
    endpoint = await runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)
    building = await in_mid_step(build(endpoint, LONG_STEPS[0]), LONG_STEPS[0])

    changed.clear()
    assert container_cgroups(tmp_path / "home")
    os.kill(record(tmp_path / "home")["pid"], signal.SIGKILL)
    await asyncio.wait_for(changed.wait(), 60)

    seen = runtime.daemons.observe()[SLOT]
    assert seen.state is DaemonState.EXITED
    assert seen.worker_uid == "uid-1"
    assert "was killed by SIGKILL" in seen.message
    assert "default worker" in seen.log_tail
    assert steps_that_sleep(LONG_STEPS[0]) == []
    assert str(tmp_path) not in mounts()
    await building.communicate()

    again = await runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)
    assert runtime.daemons.observe()[SLOT].state is DaemonState.READY
    assert "CACHED" in await output(build(again))
    assert container_cgroups(tmp_path / "home") == []


async def test_a_stop_in_mid_build_ends_everything_that_it_started(tmp_path, binaries, build):
    runtime = ProcessRuntime(tmp_path / "home", binaries, limits=ProcessLimits(stop_timeout=0.1))
    building = await in_mid_step(
        build(await runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report), LONG_STEPS[1]), LONG_STEPS[1]
    )
    assert steps_that_sleep(LONG_STEPS[1])
    await runtime.daemons.stop(SLOT)
    assert steps_that_sleep(LONG_STEPS[1]) == []
    assert processes_saying(str(tmp_path / "home/slots")) == []
    assert container_cgroups(tmp_path / "home") == []
    await building.communicate()
    await runtime.close(stop_workers=True)


async def test_a_worker_that_nobody_used_is_given_an_owner_while_it_runs(runtime, tmp_path, binaries):
    endpoint = await runtime.daemons.start(SLOT, "uid-1", None, POOL, no_report)
    assert runtime.caches.owners() == {SLOT: None}
    first = record(tmp_path / "home")

    await runtime.caches.own(SLOT, "anna")
    assert runtime.daemons.observe()[SLOT].cache_owner == "anna"
    assert await runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report) == endpoint
    assert await runtime.daemons.start(SLOT, "uid-1", None, POOL, no_report) == endpoint
    assert record(tmp_path / "home") == first
    with pytest.raises(Conflict, match="another owner"):
        await runtime.caches.own(SLOT, "bert")

    another = ProcessRuntime(tmp_path / "home", binaries)
    with pytest.raises(Conflict):
        await another.caches.own(SLOT, "bert")


async def test_a_daemon_is_taken_over_by_the_next_runtime(runtime, tmp_path, binaries, build):
    endpoint = await runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)
    pid = record(tmp_path / "home")["pid"]
    await runtime.close(stop_workers=False)

    after = ProcessRuntime(tmp_path / "home", binaries)
    changed = asyncio.Event()
    after.daemons.on_change(lambda _slot: changed.set())
    await after.adopt()
    assert after.daemons.observe()[SLOT].endpoint == endpoint
    assert after.daemons.observe()[SLOT].worker_uid == "uid-1"
    assert after.daemons.observe()[SLOT].cache_owner == "anna"
    assert "the step runs" in await output(build(endpoint))

    changed.clear()
    os.kill(pid, signal.SIGKILL)
    await asyncio.wait_for(changed.wait(), 60)
    assert after.daemons.observe()[SLOT].state is DaemonState.EXITED
    await after.purge()
    await after.close(stop_workers=True)


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
async def test_nothing_stays_of_an_adopted_daemon_whose_wrapper_hangs(tmp_path, binaries, killed):
    home = tmp_path / "home"
    before = ProcessRuntime(home, binaries)
    await before.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)
    pid = record(home)["pid"]
    wrapper = process_table.parent(process_table.parent(pid))
    await before.close(stop_workers=False)

    after = ProcessRuntime(home, binaries)
    changed = asyncio.Event()
    after.daemons.on_change(lambda _slot: changed.set())
    await after.adopt()
    freeze(wrapper)
    if killed:
        changed.clear()
        os.kill(pid, signal.SIGKILL)
        await asyncio.wait_for(changed.wait(), 30)
        assert after.daemons.observe()[SLOT].state is DaemonState.EXITED
    await after.daemons.stop(SLOT)
    assert not runs(wrapper)
    assert processes_saying(str(home / "slots")) == []
    assert cgroups(home) == []
    await after.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)
    await after.purge()
    await after.close(stop_workers=True)


async def test_a_daemon_with_its_sockets_elsewhere_is_taken_over_and_their_directory_is_removed(tmp_path, binaries):
    home = tmp_path / "home"
    older = Path("/tmp", f"bkpool-{os.geteuid()}-{home_digest(home)}")
    before = ProcessRuntime(home, binaries, runtime_dir=older)
    endpoint = await before.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)
    assert endpoint.startswith(f"unix://{older}/")
    await before.close(stop_workers=False)

    after = ProcessRuntime(home, binaries, environ=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)})
    await after.adopt()
    assert after.daemons.observe()[SLOT].endpoint == endpoint
    await after.daemons.stop(SLOT)
    endpoint = await after.daemons.start(SLOT, "uid-2", "anna", POOL, no_report)
    assert not endpoint.startswith(f"unix://{older}/")
    await after.purge()
    await after.close(stop_workers=True)
    assert not is_there(older)


async def test_a_daemon_that_is_less_isolated_than_those_of_today_is_ended(tmp_path, binaries):
    runtime = ProcessRuntime(tmp_path / "home", binaries)
    await runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)
    pid = record(tmp_path / "home")["pid"]
    await runtime.close(stop_workers=False)
    network = NetworkPrograms.find(os.environ["PATH"])
    after = ProcessRuntime(tmp_path / "home", binaries, network=network)
    await after.adopt()
    assert after.daemons.observe() == {}
    assert not runs(pid)
    assert after.caches.owners() == {SLOT: "anna"}  # the cache is kept
    await after.purge()
    await after.close(stop_workers=True)


@pytest.mark.parametrize(
    ("spec", "reaches_other"),
    [
        ({"untrusted": True}, True),
        ({"networking": {"hostPorts": [5000]}}, True),
        ({"security": {"netRaw": True}}, True),
        ({"resources": {"buildkit": {"limits": {"pids": "99"}}}}, False),
        ({"cache": {"gc": {"keepStorage": "3GB"}}}, False),
    ],
)
async def test_a_daemon_of_another_spec_is_outdated_also_after_a_crash(tmp_path, binaries, spec, reaches_other):
    network = NetworkPrograms.find(os.environ["PATH"])
    runtime = ProcessRuntime(tmp_path / "home", binaries, network=network)
    await runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)
    await runtime.close(stop_workers=False)
    after = ProcessRuntime(tmp_path / "home", binaries, network=network)
    await after.adopt()
    for given, outdated in (({}, False), (spec, True), ({}, False)):
        pool = a_pool(**given)
        await after.daemons.follow(pool.but(metadata=pool.metadata.but(name=SLOT.pool)))
        seen = after.daemons.observe()[SLOT]
        assert (seen.outdated, seen.reaches_other) == (outdated, outdated and reaches_other)
    await after.purge()
    await after.close(stop_workers=True)


async def test_a_daemon_that_does_not_answer_the_next_runtime_in_time_is_ended(runtime, tmp_path, binaries):
    await runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)
    pid = record(tmp_path / "home")["pid"]
    await runtime.close(stop_workers=False)
    freeze(pid)

    after = ProcessRuntime(tmp_path / "home", binaries, limits=ProcessLimits(adopt_timeout=0.1))
    async with asyncio.timeout(60):
        await after.adopt()
    assert after.daemons.observe() == {}
    assert not runs(pid)
    await after.purge()


async def test_a_daemon_whose_record_is_lost_is_ended_and_its_slot_starts_anew(runtime, tmp_path, binaries):
    await runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)
    pid = record(tmp_path / "home")["pid"]
    await runtime.close(stop_workers=False)
    (tmp_path / "home" / "slots" / "default" / "default" / "0" / "process.json").write_text("{}")

    after = ProcessRuntime(tmp_path / "home", binaries)
    await after.adopt()
    assert after.daemons.observe() == {}
    assert not runs(pid)
    assert after.caches.owners() == {SLOT: "anna"}
    await after.purge()


async def test_a_start_that_fails_has_the_end_of_the_log_and_leaves_nothing(runtime, tmp_path):
    with pytest.raises(WorkerFailed, match="exit code 1 before it answered") as failure:
        await runtime.daemons.start(SLOT, "uid-1", "anna", a_pool(buildkit_config="debug = 3"), no_report)
    assert "toml" in failure.value.log_tail
    assert "toml" not in failure.value.message
    assert runtime.daemons.observe() == {}
    assert processes_saying(str(tmp_path / "home")) == []
    assert not (tmp_path / "home/slots/default/default/0/process.json").exists()


async def test_a_start_that_is_given_up_leaves_nothing(runtime, tmp_path):
    starting = asyncio.create_task(runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report))
    log = tmp_path / "home/logs/default.default-worker-0.log"
    async with asyncio.timeout(60):
        while not processes_saying(str(tmp_path / "home/slots")):
            assert not starting.done()
            await asyncio.to_thread(log.exists)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert processes_saying(str(tmp_path / "home/slots")) == []
    assert runtime.daemons.observe() == {}


async def test_one_that_does_not_answer_in_time_is_ended(tmp_path, binaries, runc):
    mute = tmp_path / "mute"
    mute.write_text("#!/bin/sh\necho I say nothing; exec tail -f /dev/null\n")
    mute.chmod(0o755)
    runtime = ProcessRuntime(
        tmp_path / "home", Binaries(mute, runc, binaries.rootlesskit), limits=ProcessLimits(start_timeout=2)
    )
    with pytest.raises(WorkerFailed, match="not ready after 2 s: it does not listen") as failure:
        await runtime.daemons.start(SLOT, "uid-1", None, POOL, no_report)
    assert failure.value.log_tail == "I say nothing"
    assert processes_saying(str(tmp_path / "home/slots")) == []
    await runtime.close(stop_workers=True)


async def test_a_wipe_that_a_crash_interrupted_is_finished_before_anything_else(tmp_path, binaries):
    slot = tmp_path / "home/slots/default/default/0"
    for name in ("root", "wiped-0"):
        (slot / name / "snapshots").mkdir(parents=True)
    (slot / "cache.json").write_text('{"state": "wiping", "owner": null}')
    other = tmp_path / "home/slots/default/default/1"
    (other / "root").mkdir(parents=True)  # nobody knows whose

    runtime = ProcessRuntime(tmp_path / "home", binaries)
    await runtime.adopt()
    assert runtime.caches.owners() == {}
    assert not slot.exists()
    assert not other.exists()


async def test_the_cache_of_an_unknown_owner_is_not_given_to_anyone_even_without_adopt(tmp_path, binaries):
    (tmp_path / "home/slots/default/default/0/root").mkdir(parents=True)
    runtime = ProcessRuntime(tmp_path / "home", binaries)
    with pytest.raises(Conflict):
        await runtime.caches.own(SLOT, "anna")


async def test_a_very_long_home_is_fine_and_a_long_socket_directory_says_what_to_do(tmp_path, binaries):
    home = tmp_path.joinpath(*["a-rather-long-directory-name"] * 8)
    slot = Slot("n" * 63, "p" * 63, 10_000)
    runtime = ProcessRuntime(home, binaries)
    endpoint = await runtime.daemons.start(slot, "uid-1", None, POOL, no_report)
    assert len(endpoint) < 108
    await runtime.purge()
    await runtime.close(stop_workers=True)

    with pytest.raises(HostFault, match="too deep for sockets") as fault:
        await ProcessRuntime(home, binaries, runtime_dir=home).daemons.start(slot, "uid-1", None, POOL, no_report)
    assert "XDG_RUNTIME_DIR" in fault.value.hint


async def test_the_pools_own_configuration_is_used_but_not_its_root_and_address(runtime, tmp_path):
    own = f'root = "{tmp_path}/elsewhere"\n[grpc]\naddress = ["tcp://127.0.0.1:1"]\n[worker.oci]\nenabled = false\n'
    await runtime.daemons.start(SLOT, "uid-1", None, a_pool(buildkit_config=own), no_report)
    assert (tmp_path / "home/slots/default/default/0/root/buildkitd.lock").exists()
    assert not (tmp_path / "elsewhere").exists()


async def test_buildkitd_takes_every_setting_of_the_collection(runtime, buildctl):
    gc = CacheGC(keep_storage="3GB", keep_duration="36h", reserved_space="1 GiB", min_free_space="10 %")
    endpoint = await runtime.daemons.start(SLOT, "uid-1", None, a_pool(cache=Cache(gc=gc)), no_report)
    process = await asyncio.create_subprocess_exec(
        buildctl, f"--addr={endpoint}", "debug", "workers", "--verbose", stdout=subprocess.PIPE
    )
    text = (await process.communicate())[0].decode()
    assert text.count("GC Policy") == 3
    assert "36h0m0s" in text
    assert text.count("Maximum used space:") == text.count("3.22") == 2


async def test_buildkitd_has_no_negative_limit_of_an_absurd_size(runtime, buildctl):
    gc = CacheGC(keep_storage="99999999TB", min_free_space="12.5%")
    endpoint = await runtime.daemons.start(SLOT, "uid-1", None, a_pool(cache=Cache(gc=gc)), no_report)
    process = await asyncio.create_subprocess_exec(
        buildctl, f"--addr={endpoint}", "debug", "workers", "--verbose", stdout=subprocess.PIPE
    )
    text = (await process.communicate())[0].decode()
    assert re.findall(r"Maximum used space:\s+(\S+)", text) == ["512MB", *3 * ["576.4607523034235PB"]]


async def test_a_pools_own_file_raises_no_limit_and_names_no_other_runc(runtime, build, buildctl):
    unsafe = '[worker.oci]\nmaxUsedSpace = "90GB"\nbinary = "/bin/false"\ndefaultCgroupParent = "/bkpool-attack"\n'
    pool = a_pool(buildkit_config=f'[registry."docker.io"]\nmirrors = ["mirror.example"]\n{unsafe}')
    endpoint = await runtime.daemons.start(SLOT, "uid-1", None, pool, no_report)
    process = await asyncio.create_subprocess_exec(
        buildctl, f"--addr={endpoint}", "debug", "workers", "--verbose", stdout=subprocess.PIPE
    )
    text = (await process.communicate())[0].decode()
    assert re.findall(r"Maximum used space:\s+(\S+)", text) == ["512MB", *3 * ["10.73741824GB"]]
    assert "the step runs" in await output(build(endpoint))
    assert runtime.daemons.ignored_config(pool.spec) == [
        f"buildkitConfig.worker.oci.{key}" for key in ("binary", "defaultCgroupParent", "maxUsedSpace")
    ]


async def test_the_operators_defaults_of_the_collection_reach_buildkitd(tmp_path, binaries):
    defaults = CacheGC(keep_storage="2GB", reserved_space="1GB", min_free_space="3GB")
    runtime = ProcessRuntime(tmp_path / "home", binaries, gc_defaults=defaults)
    await runtime.daemons.start(SLOT, "uid-1", None, POOL, no_report)
    try:
        (written,) = (tmp_path / "home/slots").rglob("buildkitd.toml")
        assert 'maxUsedSpace = "2GB"' in written.read_text()
    finally:
        await runtime.close(stop_workers=True)


async def test_only_so_many_start_at_once_and_all_are_ended_together(tmp_path, binaries, monkeypatch):
    real, starting, peak, two = Daemon.start, 0, 0, asyncio.Event()

    async def counted(*arguments):
        nonlocal starting, peak
        starting += 1
        peak = max(peak, starting)
        if starting == 2:
            two.set()
        await asyncio.wait_for(two.wait(), 60)  # else the first might be up before the second begins
        try:
            return await real(*arguments)
        finally:
            starting -= 1

    monkeypatch.setattr(Daemon, "start", counted)
    runtime = ProcessRuntime(tmp_path / "home", binaries, limits=ProcessLimits(concurrent_starts=2))
    slots = [Slot("default", "default", number) for number in range(3)]
    await asyncio.gather(*(runtime.daemons.start(slot, "uid", None, POOL, no_report) for slot in slots))
    assert peak == 2
    assert set(runtime.daemons.observe()) == set(slots)
    await runtime.close(stop_workers=True)
    assert processes_saying(str(tmp_path / "home/slots")) == []


def test_it_works_on_uvloop_too(tmp_path, binaries):
    async def live() -> None:
        runtime = ProcessRuntime(tmp_path / "home", binaries)
        changed = asyncio.Event()
        runtime.daemons.on_change(lambda _slot: changed.set())
        await runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)
        changed.clear()
        os.kill(record(tmp_path / "home")["pid"], signal.SIGKILL)
        await asyncio.wait_for(changed.wait(), 60)
        assert runtime.daemons.observe()[SLOT].state is DaemonState.EXITED
        await runtime.close(stop_workers=True)

    uvloop.run(live())


async def test_a_missing_buildkitd_is_named(tmp_path, runc):
    runtime = ProcessRuntime(tmp_path / "home", Binaries(tmp_path / "buildkitd", runc))
    with pytest.raises(HostFault, match="buildkitd is not there") as fault:
        await runtime.daemons.start(SLOT, "uid-1", None, POOL, no_report)
    assert fault.value.code == "ToolMissing"


async def test_a_stop_that_is_given_up_leaves_the_daemon_watched(tmp_path, binaries, build):
    runtime = ProcessRuntime(tmp_path / "home", binaries)
    endpoint = await runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)
    building = await in_mid_step(build(endpoint, LONG_STEPS[2]), LONG_STEPS[2])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await runtime.daemons.stop(SLOT)  # buildkitd waits for the build
    assert runtime.daemons.observe()[SLOT].state is DaemonState.READY

    changed = asyncio.Event()
    runtime.daemons.on_change(lambda _slot: changed.set())
    os.kill(record(tmp_path / "home")["pid"], signal.SIGKILL)
    await asyncio.wait_for(changed.wait(), 60)
    assert runtime.daemons.observe()[SLOT].state is DaemonState.EXITED
    await building.communicate()
    await runtime.close(stop_workers=True)


async def test_a_write_that_was_given_up_never_comes_after_the_next(tmp_path, binaries, monkeypatch):
    real, writing, may_go_on = SlotFiles.write_cache, threading.Event(), threading.Event()

    def slow(files, record):
        writing.set()
        assert record.owner == "bert" or may_go_on.wait(60)
        real(files, record)

    monkeypatch.setattr(SlotFiles, "write_cache", slow)
    runtime = ProcessRuntime(tmp_path / "home", binaries)
    first = asyncio.create_task(runtime.caches.own(SLOT, "anna"))
    await asyncio.to_thread(writing.wait, 60)
    first.cancel()
    second = asyncio.create_task(runtime.caches.own(SLOT, "bert"))
    for _ in range(10):
        await asyncio.sleep(0)  # a turn of the loop
    assert not first.done()
    may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    await second
    assert SlotFiles(tmp_path / "home", SLOT).read_cache() == CacheRecord.of("bert")
    assert runtime.caches.owners() == {SLOT: "bert"}


@pytest.mark.parametrize(
    ("environ", "spec", "limit"),
    [
        ({"BUILDKIT_STEP_LOG_MAX_SIZE": "9"}, {}, "9B"),
        ({"BUILDKIT_STEP_LOG_MAX_SIZE": "9"}, {"stepLog": {"maxSize": "8B"}}, "8B"),
        ({}, {"stepLog": {"maxSpeed": "7B"}}, "7B/s"),
    ],
    ids=["of the appliance", "of the pool before that", "a speed"],
)
async def test_the_output_of_a_step_is_clipped_as_the_pool_or_the_appliance_says(
    tmp_path, binaries, build, environ, spec, limit
):
    runtime = ProcessRuntime(tmp_path / "home", binaries, environ={**os.environ, **environ})
    pool = a_pool(**spec)
    try:
        shown = await output(build(await runtime.daemons.start(SLOT, "uid-1", "anna", pool, no_report)))
        assert f"output clipped, log limit {limit} reached" in shown
        assert (runtime._launcher.confinement(pool.spec) == runtime._launcher.confinement(POOL.spec)) is not bool(
            spec
        )
    finally:
        await runtime.purge()
        await runtime.close(stop_workers=True)
