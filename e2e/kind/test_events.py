"""kubectl shows the Kubernetes Events of an object."""

from __future__ import annotations

from store.test_contract import a_pool

from bkpool.core.names import Slot
from bkpool.core.worker import new_worker
from bkpool.store.events import KubernetesRecorder


async def test_kubectl_describe_shows_events(store, api, kubectl):
    pool = await store.create(a_pool())
    worker = await store.create(new_worker(Slot("default", "p", 0), pool, None, {}))
    recorder = KubernetesRecorder(api, "e2e")
    recorder.record(worker, "Allocated", "leased to ann for job 7")
    recorder.record(worker, "Failed", "the image cannot be pulled", warning=True)
    await recorder.close()
    for _ in range(2):
        recorder.record(worker, "Failed", "the image cannot be pulled", warning=True)
        await recorder.close()

    shown = kubectl("describe", "buildkitworker", worker.key.name, "-n", "default")
    events = [line.split(None, 3) for line in shown.partition("Events:")[2].splitlines()[3:]]
    assert {(kind, reason) for kind, reason, *_ in events} == {("Normal", "Allocated"), ("Warning", "Failed")}
    assert "leased to ann for job 7" in shown
    listed = kubectl("get", "events", "-n", "default", "--field-selector", f"involvedObject.uid={worker.uid}")
    assert listed.count("the image cannot be pulled") == 1, "three equal events are counted in one"
    kubectl("delete", "events", "-n", "default", "--field-selector", f"involvedObject.uid={worker.uid}")
