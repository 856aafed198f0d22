from __future__ import annotations

from bkpool.core.pool import ResourceRequirements
from bkpool.workers.processes.cgroup_limits import Limits, files, together

GIB = 1 << 30


def written(limits: Limits, *, unified: bool) -> dict[str, str]:
    return {file: content for _, file, content in files(limits, unified=unified)}


def test_all_slots_get_the_memory_less_a_gib_or_a_tenth():
    assert together(8 * GIB, None).memory == 7 * GIB
    assert together(100 * GIB, None).memory == 90 * GIB
    assert together(100 * GIB, 4 * GIB).memory == 3 * GIB
    assert together(GIB, 100 * GIB).memory == GIB // 2
    assert together(GIB, None).pids is None


def test_a_slot_has_a_limit_of_processes_and_no_other():
    limits = Limits.of(ResourceRequirements())
    assert written(limits, unified=False) == written(limits, unified=True) == {"pids.max": "8192"}


def test_the_resources_of_a_pool_are_limits_on_both_versions():
    given = {"cpu": "500m", "memory": "2Gi", "pids": 100}
    limits = Limits.of(ResourceRequirements(limits=given, requests={"cpu": 4, "memory": "1Gi"}))
    assert written(limits, unified=False) == {
        "memory.limit_in_bytes": str(2 * GIB),
        "memory.memsw.limit_in_bytes": str(2 * GIB),
        "memory.soft_limit_in_bytes": str(GIB),
        "cpu.cfs_quota_us": "50000",
        "cpu.shares": "4096",
        "pids.max": "100",
    }
    assert written(limits, unified=True) == {
        "memory.max": str(2 * GIB),
        "memory.swap.max": "0",
        "memory.low": str(GIB),
        "cpu.max": "50000 100000",
        "cpu.weight": "157",
        "pids.max": "100",
    }


def test_no_amount_of_cpu_is_one_that_the_kernel_refuses():
    least = Limits.of(ResourceRequirements(limits={"cpu": "1m"}, requests={"cpu": 0}))
    assert written(least, unified=False) == {"cpu.cfs_quota_us": "1000", "cpu.shares": "2", "pids.max": "8192"}
    most = Limits.of(ResourceRequirements(requests={"cpu": 10_000}))
    assert written(most, unified=True) == {"cpu.weight": "10000", "pids.max": "8192"}
