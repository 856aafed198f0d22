"""Where kubectl finds the cluster of this home."""

import json

CONFIG = "apiVersion: v1\nkind: Config\n"


def test_a_home_without_a_cluster_says_what_makes_one(called):
    code, out, err = called("kubeconfig")
    assert (code, out) == (5, "")
    assert "this home has no kind cluster" in err
    assert "bkpool up --backend kind" in err


def test_it_says_where_it_is_and_prints_it_raw(called, home):
    path = home / "kubeconfig"
    home.mkdir(exist_ok=True)
    path.write_text(CONFIG)
    path.chmod(0o600)
    assert json.loads(called("kubeconfig")[1]) == {"kubeconfig": str(path)}
    assert called("kubeconfig", "--raw")[1] == CONFIG


def test_one_that_others_can_read_is_not_shown(called, home):
    path = home / "kubeconfig"
    home.mkdir(exist_ok=True)
    path.write_text(CONFIG)
    path.chmod(0o644)
    code, out, err = called("kubeconfig", "--raw")
    assert (code, out) == (78, "")
    assert f"chmod 600 {path}" in err


def test_on_a_terminal_it_says_how_to_use_it(on_terminal, home):
    home.mkdir(exist_ok=True)
    (home / "kubeconfig").write_text(CONFIG)
    code, shown = on_terminal("kubeconfig")
    assert code == 0
    assert f"export KUBECONFIG={home}/kubeconfig" in shown
