"""Where kubectl finds the cluster of this home."""

import json

CONFIG = "apiVersion: v1\nkind: Config\n"


def test_without_a_cluster_the_hint_says_how_to_make_one(called):
    code, out, err = called("kubeconfig")
    assert (code, out) == (5, "")
    assert "this home has no kind cluster" in err
    assert "bkpool up --backend kind" in err


def test_the_path_is_shown_and_the_content_with_raw(called, home):
    path = home / "kubeconfig"
    home.mkdir(exist_ok=True)
    path.write_text(CONFIG)
    path.chmod(0o600)
    assert json.loads(called("kubeconfig")[1]) == {"kubeconfig": str(path)}
    assert called("kubeconfig", "--raw")[1] == CONFIG


def test_a_kubeconfig_that_others_can_read_is_not_shown(called, home):
    path = home / "kubeconfig"
    home.mkdir(exist_ok=True)
    path.write_text(CONFIG)
    path.chmod(0o644)
    code, out, err = called("kubeconfig", "--raw")
    assert (code, out) == (78, "")
    assert f"chmod 600 {path}" in err


def test_on_a_terminal_the_use_of_the_kubeconfig_is_shown(on_terminal, home):
    home.mkdir(exist_ok=True)
    (home / "kubeconfig").write_text(CONFIG)
    code, shown = on_terminal("kubeconfig")
    assert code == 0
    assert f"export KUBECONFIG={home}/kubeconfig" in shown
