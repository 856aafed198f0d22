"""`bkpool pki`: the CA of a stopped appliance and of one in a cluster is replaced, once at a time."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from bkpool.appliance import ca_rotation
from bkpool.appliance.ca_rotation import of_cluster, of_home
from bkpool.cli import program
from bkpool.cli.pki import _text
from bkpool.core.errors import Conflict, HostFault, NotFound
from bkpool.home.files import private_directory
from bkpool.home.lock import HomeLock
from bkpool.kube import ClusterAccess
from bkpool.pki import storage
from bkpool.pki.bundle import ClusterSecrets
from bkpool.store.sqlite import SqliteStore
from support.objects import lease, worker

NOW = datetime.now(UTC)
SECRET = "/api/v1/namespaces/system/secrets/bkpool-pki"
DEPLOYMENT = "/apis/apps/v1/namespaces/system/deployments/buildkit-controller"


@pytest.fixture
async def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    private_directory(path)
    storage.load_or_create(path / "pki", NOW)
    (path / "backend").write_text("process\n")
    store = await SqliteStore.open(path / "state.db")
    await store.create(worker(0, lease(now=NOW)))
    await store.close()
    return path


async def test_the_ca_of_a_home_is_replaced_and_the_one_of_before_stays_trusted(home):
    before = await of_home(home, rotate=False)
    after = await of_home(home, rotate=True)
    assert after.authority.mark != before.authority.mark == after.former.authority.mark
    assert after.overlaps
    assert (await of_home(home, rotate=False)).to_json() == after.to_json()
    with pytest.raises(Conflict, match="last rotation is not over"):
        await of_home(home, rotate=True)


async def test_a_home_without_a_ca_gets_none(tmp_path):
    for rotate in (False, True):
        with pytest.raises(NotFound):
            await of_home(tmp_path / "none", rotate=rotate)
    assert not (tmp_path / "none" / "pki").exists()


def test_the_command_answers_without_a_key_and_not_while_the_appliance_runs(home, monkeypatch):
    monkeypatch.setenv("BKPOOL_HOME", str(home))
    with HomeLock(home):
        refused = CliRunner().invoke(program, ["pki", "rotate"])
        assert isinstance(refused.exception, HostFault)
        assert refused.exception.code == "AlreadyRunning"
        assert CliRunner().invoke(program, ["pki", "show"]).exit_code == 0
    rotated = CliRunner().invoke(program, ["pki", "rotate"])
    assert rotated.exit_code == 0
    answer = json.loads(rotated.stdout)
    assert answer["formerTrusted"] is True
    assert "PRIVATE" not in rotated.output
    assert json.loads(CliRunner().invoke(program, ["pki", "show"]).stdout)["authority"] == answer["authority"]


class Cluster:
    """A KubeApi with the Secret of an appliance, and possibly its Deployment."""

    def __init__(self, *, deployed: bool = True) -> None:
        data = ClusterSecrets.create(NOW).to_data()
        encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
        self.secret: dict = {"metadata": {"name": "bkpool-pki", "resourceVersion": "7"}, "data": encoded}
        self.deployed = deployed
        self.patches: list[dict] = []
        self.workers: list[dict] = []
        self.lists: list[str] = []
        self.container: dict | None = None

    def __call__(self, _access: ClusterAccess) -> Cluster:
        return self

    async def close(self) -> None:
        pass

    async def get(self, path: str) -> dict:
        if path == DEPLOYMENT and self.container is not None:
            return {"spec": {"template": {"spec": {"containers": [{"name": "a-sidecar"}, self.container]}}}}
        if path != SECRET:
            raise NotFound(path)
        return self.secret

    async def list(self, path: str, **_params: str) -> tuple[list[dict], str]:
        assert path.endswith("/buildkitworkers")
        self.lists.append(path)
        return self.workers, "9"

    async def replace(self, path: str, body: dict) -> dict:
        assert (path, body["metadata"]["resourceVersion"]) == (SECRET, "7")
        self.secret = body
        return body

    async def patch(self, path: str, body: dict) -> dict:
        if not self.deployed:
            raise NotFound(path)
        assert path == DEPLOYMENT
        self.patches.append(body)
        return body

    def secrets(self) -> ClusterSecrets:
        return ClusterSecrets.of_data({key: base64.b64decode(value) for key, value in self.secret["data"].items()})


@pytest.fixture
def cluster(monkeypatch) -> Cluster:
    made = Cluster()

    async def connect(_access: ClusterAccess) -> Cluster:
        return made

    monkeypatch.setattr(ca_rotation.KubeApi, "connect", connect)
    return made


async def test_the_cas_of_a_cluster_are_replaced_and_the_appliances_pods_read_them(cluster):
    before = cluster.secrets()
    state = await of_cluster(ClusterAccess(), "system", rotate=True)
    after = cluster.secrets()
    assert state.restarted
    assert len(cluster.patches) == 1
    assert after.former.authority.cert_pem == before.authority.cert_pem
    assert after.backends[1].cert_pem == before.backend.cert_pem
    assert after.token_key == before.token_key, "tokens stay valid"
    with pytest.raises(Conflict, match="last rotation is not over"):
        await of_cluster(ClusterAccess(), "system", rotate=True)


async def test_an_appliance_outside_of_its_cluster_has_no_pods_to_replace(cluster):
    cluster.deployed = False
    assert not (await of_cluster(ClusterAccess(), "system", rotate=True)).restarted


async def test_leases_of_before_hold_the_next_rotation_up(cluster):
    await of_cluster(ClusterAccess(), "system", rotate=True)
    data = cluster.secret["data"]
    data["rotated-at"] = base64.b64encode((NOW - timedelta(days=2)).isoformat().encode()).decode()
    cluster.workers = [worker(0, lease(now=NOW - timedelta(days=3))).to_json()]
    with pytest.raises(Conflict, match="last rotation is not over"):
        await of_cluster(ClusterAccess(), "system", rotate=True)
    cluster.workers = [worker(0, lease(now=NOW)).to_json()]
    assert (await of_cluster(ClusterAccess(), "system", rotate=False)).overlaps is False
    assert (await of_cluster(ClusterAccess(), "system", rotate=True)).restarted


async def test_a_damaged_or_missing_secret_is_not_replaced(cluster):
    cluster.secret["data"]["ca.key"] = "bm9uc2Vuc2U="
    with pytest.raises(HostFault, match="bkpool-pki"):
        await of_cluster(ClusterAccess(), "system", rotate=True)
    assert cluster.secret["data"]["ca.key"] == "bm9uc2Vuc2U="
    with pytest.raises(NotFound, match="does not exist"):
        await of_cluster(ClusterAccess(), "elsewhere", rotate=True)


VARIABLE = "BKPOOL_KUBERNETES_POOL_NAMESPACES"


@pytest.mark.parametrize(
    ("container", "namespaces"),
    [
        (None, []),
        ({}, []),
        ({"args": ["up", "--pool-namespace=a", "--pool-namespace=b"]}, ["a", "b"]),
        ({"args": ["up", "--pool-namespace", "a", "--pool-namespace", "b", "--namespace", "c"]}, ["a", "b"]),
        ({"command": ["bkpool", "up", "--pool-namespace", "a"]}, ["a"]),
        ({"env": [{"name": "HOME", "value": "/"}, {"name": VARIABLE, "value": "a,b"}]}, ["a", "b"]),
        ({"args": ["--pool-namespace=a"], "env": [{"name": VARIABLE, "value": "b"}]}, ["a"]),
        ({"env": [{"name": VARIABLE, "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "x"}}}]}, []),
    ],
)
@pytest.mark.parametrize("rotate", [False, True])
async def test_the_leases_of_the_installations_own_namespaces_count_and_the_answer_names_them(
    cluster, container, namespaces, rotate
):
    cluster.container = container
    state = await of_cluster(ClusterAccess(), "system", rotate=rotate)
    group = "/apis/buildkit.smrt-devops.net/v1alpha1"
    wanted = [f"{group}/namespaces/{name}/buildkitworkers" for name in namespaces] or [f"{group}/buildkitworkers"]
    assert sorted(cluster.lists) == wanted
    assert state.to_json()["namespaces"] == (namespaces or ["*"])
    told = "in the namespaces " + ", ".join(namespaces) if namespaces else "in all namespaces"
    assert f"the leases that count are those {told}" in _text(state)


async def test_at_home_there_are_no_namespaces(home):
    state = await of_home(home, rotate=False)
    assert state.to_json()["namespaces"] is None
    assert "namespace" not in _text(state)
