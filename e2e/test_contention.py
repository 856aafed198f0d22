"""Many requests at once: a worker never has two holders, the maximum is kept, and the others are served in order."""

from __future__ import annotations

import asyncio
import json

import aiohttp

from harness import eventually

WORKERS = 4


async def _many(appliance, count):
    """Makes `count` allocate requests. All are in the queue, in order, before the first worker is released."""
    bearer = (appliance.home / "admin.token").read_text().strip()
    holders: dict[str, int] = {}
    claimed: list[tuple[str, int]] = []
    most = 0
    all_wait = asyncio.Event()
    base = f"http://127.0.0.1:{appliance.ports['api']}/api/v1"

    async def pool(session: aiohttp.ClientSession):
        async with session.get(f"{base}/pools/default") as answer:
            return await answer.json()

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        nonlocal most
        async with session.post(f"{base}/workers/allocate", json={"poolName": "default", "wait": "10m"}) as answer:
            lease = await answer.json()
            assert answer.status == 200, lease
        assert lease["workerName"] not in holders, "two holders of one worker"
        holders[lease["workerName"]] = number
        claimed.append(
            (lease["expiresAt"], number)
        )  # ordered by the time of the claim, because answers may overtake each other
        most = max(most, len(holders))
        await all_wait.wait()
        assert (await pool(session))["workers"] <= WORKERS
        del holders[lease["workerName"]]
        async with session.post(f"{base}/workers/release", json={"token": lease["token"]}) as answer:
            assert answer.status == 200

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)  # the API ends each request
    headers = {"Authorization": f"Bearer {bearer}"}
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        tasks = []
        for number in range(count):
            tasks.append(asyncio.create_task(one(session, number)))
            while number >= WORKERS and (await pool(session))["waiting"] < number - WORKERS + 1:
                pass
        all_wait.set()
        await asyncio.gather(*tasks)
    return [number for _, number in sorted(claimed)], most


def test_two_hundred_requests_at_once_share_four_workers(make_appliance):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": WORKERS}})
    order, most = asyncio.run(_many(appliance, 200))
    assert len(order) == 200
    assert most <= WORKERS
    # A worker is probed after it is given and before it is claimed, so the claims of the others may come first.
    overtaken = [sum(later < number for later in order[position:]) for position, number in enumerate(order)]
    assert max(overtaken) <= WORKERS, "first come, first served, except for claims at the same moment"
    assert appliance.pool()["workers"] <= WORKERS


def test_a_caller_who_closes_the_connection_leaves_nothing(make_appliance):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 1}})
    held = appliance.allocate()
    waiting = [appliance.start(*appliance.program, "allocate", "--wait", "5m") for _ in range(3)]
    eventually(lambda: appliance.pool()["waiting"] == 3, "three wait")
    for process in waiting[:2]:
        process.kill()
        process.communicate()
    eventually(lambda: appliance.pool()["waiting"] == 1, "two have left the queue")
    appliance.release(held.lease).ok()
    out, _ = waiting[2].communicate(timeout=60)
    assert waiting[2].returncode == 0, out
    assert appliance.pool()["allocated"] == 1


def test_the_same_job_gets_the_same_lease(make_appliance):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 2}})
    both = [appliance.start(*appliance.program, "allocate", "--job-id", "j") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    leases = [json.loads(text[text.index("{") :]) for text in outputs]  # after the message that it waits
    assert leases[0]["token"] == leases[1]["token"]
    eventually(lambda: appliance.pool()["allocated"] == 1, "a second claim for the same job is released")
    assert appliance.allocate("--job-id", "other").lease["token"] != leases[0]["token"]
