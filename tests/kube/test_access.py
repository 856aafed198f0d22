"""A kubeconfig that cannot be used is the user's to mend: the error names the place, the file and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from bkpool.appliance.run_options import RunOptions
from bkpool.core.errors import HostFault, InvalidInput
from bkpool.kube import ClusterAccess, KubeApi
from bkpool.settings.sources import from_environment, from_options, resolve

GOOD = """
apiVersion: v1
kind: Config
current-context: x
contexts: [{name: x, context: {cluster: x, user: x}}, {name: other, context: {cluster: x, user: x, namespace: n}}]
clusters: [{name: x, cluster: {server: "http://127.0.0.1:1"}}]
users: [{name: x, user: {}}]
"""
DOUBLING = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))
SECRET = "MIGHAgEAMBMGByqGSM49"
BROKEN = {
    "": "it is not a kubeconfig",
    "5": "it is not a kubeconfig",
    "clusters: 5": "",
    "a: [1": "it is not YAML (line 1)",
    f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----\n": "",
    f"a: b: {SECRET}": "it is not YAML (line 1)",
    GOOD.replace('"http://127.0.0.1:1"', "5"): "",
    GOOD.replace("http:", "ftp:"): "the server in it is not a URL",
    GOOD.replace("clusters: [", "clusters: [5, "): "",
    GOOD.replace("context: {cluster: x, user: x}", "context: 5"): "",
    GOOD.replace("context: {cluster: x, user: x}", "context: {cluster: y, user: x}"): "",
    GOOD.replace("user: {}", "user: 5"): "",
    "\0": "it is not YAML",
    "\udcff": "it is not YAML",
    DOUBLING: "aliases that repeat more than 10000 nodes (line 12)",
    " " * (1 << 20) + GOOD: "it is larger than 1048576 bytes",
}
"""Content to what the message says at its end."""


def access(**variables: str) -> ClusterAccess:
    values = resolve(from_environment(variables, Path("/")))
    return RunOptions(Path("/h"), Path("/c"), settings=values.settings, places=values.places).access


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("variable", ["BKPOOL_KUBERNETES_KUBECONFIG", "KUBECONFIG"])
async def test_a_broken_kubeconfig_is_named_with_its_place(tmp_path, monkeypatch, content, variable):
    file = tmp_path / "config"
    file.write_text(content, errors="surrogateescape")
    monkeypatch.setenv("KUBECONFIG", str(file))
    monkeypatch.setattr("kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))  # read at import
    with pytest.raises(HostFault) as caught:
        await KubeApi.connect(access(**{variable: str(file)}))
    assert caught.value.message.startswith(f"{variable}: {file} gives no access to a cluster: ")
    assert caught.value.message.endswith(BROKEN[content])
    assert SECRET not in caught.value.message
    assert "kubectl get nodes" in caught.value.hint
    assert caught.value.code == "Unreadable"


async def test_a_kubeconfig_that_does_not_exist_is_one_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(HostFault, match=r"gives no access to a cluster: No such file or directory$"):
        await KubeApi.connect(access())
    assert capsys.readouterr() == ("", "")


async def test_the_option_is_named_if_it_gave_the_file(tmp_path):
    (tmp_path / "config").write_text("")
    values = resolve(from_options({"kubernetes.kubeconfig": "config"}, tmp_path))
    options = RunOptions(tmp_path, tmp_path, settings=values.settings, places=values.places)
    with pytest.raises(HostFault, match=f"^--kubeconfig: {tmp_path}/config gives no access"):
        await KubeApi.connect(options.access)


async def test_a_context_that_is_missing_is_the_fault_of_who_gave_it(tmp_path):
    (tmp_path / "config").write_text(GOOD)
    given = {"BKPOOL_KUBERNETES_KUBECONFIG": str(tmp_path / "config"), "BKPOOL_KUBERNETES_CONTEXT": "nope"}
    with pytest.raises(InvalidInput) as caught:
        await KubeApi.connect(access(**given))
    assert caught.value.message == f"BKPOOL_KUBERNETES_CONTEXT: {tmp_path}/config has no context 'nope'"
    assert caught.value.hint == "It has: x, other."
    api = await KubeApi.connect(access(**given | {"BKPOOL_KUBERNETES_CONTEXT": "other"}))
    await api.close()
    assert api.namespace == "n"
