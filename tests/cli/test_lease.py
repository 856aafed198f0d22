"""allocate, renew, release, status: the real program against a server that implements the contract."""

import base64
import io
import json
import signal
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from .conftest import LONGEST_RUN, settled

TOKEN = "t0ken-" + "A" * 37
TIMEOUT = 60.0


def test_allocate_in_a_pipe_answers_with_the_contracts_json_and_nothing_else(bkpool, api, appliance):
    done = bkpool("allocate", "-p", "big", "-n", "team", "--ttl", "30m", "--job-id", "j", "--wait", "10s")
    assert (done.returncode, settled(done.stderr)) == (0, "")
    assert set(json.loads(done.stdout)) == {
        *("workerName", "token", "endpoint", "gatewayEndpoint", "expiresAt", "caCert", "clientCert", "clientKey")
    }
    call = api.next("allocate")
    csr = x509.load_pem_x509_csr(call.body.pop("csr").encode())
    assert call.body == {"poolName": "big", "namespace": "team", "jobId": "j", "ttl": "30m", "wait": "10s"}
    key = load_pem_private_key(base64.b64decode(json.loads(done.stdout)["clientKey"]), None)
    assert csr.is_signature_valid
    assert key.public_key() == csr.public_key()
    assert key.curve.name == "secp256r1"
    assert call.headers["Authorization"] == "Bearer admin-secret"


@pytest.mark.parametrize(("given", "sent"), [((), {}), (("--wait", "5m"), {"wait": "5m"})])
def test_without_the_option_the_appliance_decides_how_long_to_wait(bkpool_here, api, appliance, given, sent):
    assert bkpool_here("allocate", *given).returncode == 0
    body = api.next("allocate").body
    assert {field: body[field] for field in body if field == "wait"} == sent


def test_the_environment_gives_namespace_and_gateway(bkpool_here, api, appliance):
    done = bkpool_here("allocate", BKCTL_NAMESPACE="team", BKCTL_GATEWAY_ENDPOINT="tcp://gw:9")
    assert json.loads(done.stdout)["gatewayEndpoint"] == "tcp://gw:9"
    assert api.next().body["namespace"] == "team"


def test_out_has_private_files_and_the_command_has_absolute_paths(bkpool_here, api, appliance, tmp_path):
    done = bkpool_here("allocate", "--out", "certs")
    directory = tmp_path / "certs"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()}
    assert modes == dict.fromkeys(("ca.crt", "client.crt", "client.key", "lease.json"), 0o600)
    assert (directory / "client.key").read_text().startswith("-----BEGIN PRIVATE KEY-----\n")
    options = f"cacert={directory}/ca.crt,cert={directory}/client.crt,key={directory}/client.key"
    assert settled(done.stderr).split() == [
        *("docker", "buildx", "create", "--name", "default-worker-0", "--driver", "remote"),
        *("--driver-opt", options, "tcp://localhost:1235"),
    ]
    assert json.loads(done.stdout)["token"] == TOKEN


def test_out_with_an_earlier_lease_says_how_to_end_it(called, api, appliance, tmp_path):
    earlier = {"workerName": "default-worker-7", "token": "x" * 43, "expiresAt": "2099-01-01T00:00:00Z"}
    (tmp_path / "lease.json").write_text(json.dumps(earlier))
    told = called("allocate", "--out", tmp_path)[2]
    assert f"note: {tmp_path} had the files of an earlier lease, of worker default-worker-7." in told
    assert "goes on until it expires at 2099-01-01T00:00:00Z" in told
    assert f"`bkpool release --token {tmp_path}` before" in told
    assert "note:" not in called("allocate", "--out", tmp_path)[2]  # the same lease again
    (tmp_path / "lease.json").write_text(json.dumps(earlier | {"expiresAt": "2001-01-01T00:00:00Z"}))
    assert "note:" not in called("allocate", "--out", tmp_path)[2]


def test_without_a_writable_directory_no_lease_is_requested(bkpool_here, api, appliance, tmp_path):
    (tmp_path / "file").touch()
    done = bkpool_here("allocate", "--out", "file/certs")
    assert done.returncode == 77
    assert "cannot be written" in done.stderr
    assert api.calls.empty()


def test_a_lease_whose_files_cannot_be_written_is_released(bkpool_here, api, appliance, tmp_path):
    (tmp_path / "certs" / "client.key").mkdir(parents=True)
    done = bkpool_here("allocate", "--out", "certs")
    assert done.returncode == 71
    api.next("allocate")
    assert api.next("release").body == {"token": TOKEN}


def test_on_a_terminal_allocate_shows_files_and_commands_instead_of_keys(on_terminal, api, appliance, home):
    code, shown = on_terminal("allocate")
    directory = home / "leases" / "default" / "default-worker-0"
    assert code == 0
    assert (
        f"docker buildx create --name default-worker-0 --driver remote --driver-opt cacert={directory}/ca.crt"
        in shown
    )
    assert f"bkpool release --token {directory}" in shown
    assert TOKEN not in shown
    assert (directory / "client.key").exists()


def test_a_long_wait_is_shown(started, api, appliance):
    go_on = threading.Event()
    api.before_answer["allocate"] = lambda *_: go_on.wait(TIMEOUT)
    process = started("allocate")
    assert process.stderr.readline() == "waiting for a worker of pool default\n"
    go_on.set()
    assert json.loads(process.stdout.read())["token"] == TOKEN


def test_ctrl_c_while_waiting_hangs_up(started, api, appliance):
    hung_up = threading.Event()

    def wait(_call, connection):
        process.send_signal(signal.SIGINT)
        if connection.recv(1) == b"":
            hung_up.set()

    api.before_answer["allocate"] = wait
    process = started("allocate")
    assert process.wait(TIMEOUT) == 130
    assert hung_up.wait(TIMEOUT)
    assert "Traceback" not in process.stderr.read()


def test_an_error_is_message_and_hint_on_stderr_with_its_exit_code(bkpool, api, appliance):
    failure = {"code": "NoCapacity", "message": "no worker came free in 5m", "hint": "Raise scaling.max."}
    api.answers["allocate"] = (503, {"error": failure})
    done = bkpool("allocate")
    assert (done.returncode, done.stdout) == (75, "")
    assert settled(done.stderr) == "error: no worker came free in 5m\nhint: Raise scaling.max.\n"


def test_without_an_appliance_the_hint_says_how_to_start_one(bkpool_here):
    done = bkpool_here("status", BKCTL_ENDPOINT="http://127.0.0.1:1")
    assert done.returncode == 69
    assert done.stderr.startswith("error: no appliance answers at http://127.0.0.1:1\nhint: Start it with `bkpool up")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("allocate", "--ttl", "banana"), "--ttl"),
        (("allocate", "--ttl", "-1h"), "--ttl"),
        (("allocate", "--wait", "1"), "--wait"),
        (("build", "--ttl", "9" * 80), "--ttl"),
        (("build", "--builder", "x", "."), "--builder"),
        (("renew", "-t", TOKEN, "--ttl", ""), "--ttl"),
        (("renew",), "--token"),
        (("status", "-n", "A B"), "--namespace"),
        (("manifests", "--image", ""), "--image"),
        (("release", "-t", "wrong-token"), "--token"),
        (("release", "-t", TOKEN, "--worker", "w"), "--worker"),
        (("up", "--dev-issuer-address", "8888"), "--dev-issuer-address"),
        (("up", "--api-cert", "nope.pem"), "--api-cert"),
        (("oidc-token", "--issuer", "http://issuer.example"), "--issuer"),
        (("oidc-token", "--issuer", "https://me:secret@issuer.example"), "--issuer"),
        (("oidc-token", "--claim", "x"), "--claim"),
        (("oidc-token", "--duration", "soon"), "--duration"),
        (("auth", "check", "--token-file", "nope", "-p", "x"), "--token-file"),
        (("auth", "check", "--token-file", "-", "-p", "x"), "--token-file"),
        (("release", "-t", "-"), "--token"),
        (("up", "--api-address", "8082"), "--api-address"),
        (("up", "--gateway-address", "::1:1235"), "--gateway-address"),
        (("up", "--metrics-address", "x:99999"), "--metrics-address"),
        (("up", "--drain-timeout", "soon"), "--drain-timeout"),
        (("up", "-f", "nope.yaml"), "--file"),
        (("up", "--backend", "qemu"), "--backend"),
        (("allocate", "--nope"), "--nope"),
        (("nope",), "nope"),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_field(called, arguments, field):
    code, _, stderr = called(*arguments)
    assert code == 2
    error, *hint = stderr.splitlines()
    assert error.startswith("error: ")
    assert field in error
    assert all(line.startswith("hint: ") for line in hint)
    assert "wrong-token" not in stderr


@pytest.mark.parametrize("content", [TOKEN, f"{TOKEN}\n", json.dumps({"token": TOKEN, "workerName": "w"}, indent=2)])
@pytest.mark.parametrize("how", ["stdin", "file", "@file", "directory", "variable"])
def test_a_token_can_come_from_stdin_a_file_a_directory_or_the_environment(
    called, api, appliance, tmp_path, monkeypatch, how, content
):
    (tmp_path / "lease.json").write_text(content)
    monkeypatch.setattr("sys.stdin", io.StringIO(content))
    monkeypatch.setenv("BKPOOL_LEASE_TOKEN", TOKEN if how == "variable" else "")
    given = {"stdin": "-", "file": tmp_path / "lease.json", "@file": f"@{tmp_path}/lease.json", "directory": tmp_path}
    _, answer, _ = called("release", *(("--token", given[how]) if how in given else ()))
    assert json.loads(answer) == {"status": "released"}
    assert api.next("release").body == {"token": TOKEN}


def test_older_scripts_may_still_give_the_token_itself(bkpool_here, api, appliance):
    assert bkpool_here("release", "--token", TOKEN).returncode == 0
    assert api.next("release").body == {"token": TOKEN}


def test_a_lease_may_be_named_by_its_worker(called, api, appliance, monkeypatch):
    monkeypatch.setenv("BKPOOL_LEASE_TOKEN", TOKEN)  # of whatever else runs here
    assert called("release", "--worker", "w", "-n", "team")[0] == 0
    assert api.next("release").body == {"workerName": "w", "namespace": "team"}
    assert called("renew", "--worker", "w", "--ttl", "2h")[0] == 0
    assert api.next("renew").body == {"workerName": "w", "namespace": "default", "ttl": "2h"}


def test_renew_sends_the_new_ttl(bkpool_here, api, appliance):
    done = bkpool_here("renew", "-t", "-", "--ttl", "2h", stdin=TOKEN)
    assert json.loads(done.stdout)["expiresAt"] == "2030-01-01T00:00:00Z"
    assert api.next("renew").body == {"token": TOKEN, "ttl": "2h"}


def test_older_flags_are_accepted_and_explained(bkpool_here, api, appliance):
    done = bkpool_here("allocate", "--oidc-actor", "me", "--oidc-repository", "r", BKCTL_ALLOW_NO_AUTH="1")
    assert done.returncode == 0
    assert [line.split()[1] for line in settled(done.stderr).splitlines()] == [
        *("--oidc-actor", "--oidc-repository", "BKCTL_ALLOW_NO_AUTH")
    ]


POOL = {
    "name": "default",
    "namespace": "default",
    "min": 0,
    "max": 4,
    "workers": 1,
    "ready": 1,
    "idle": 0,
    "allocated": 1,
    "waiting": 0,
    "connections": 2,
    "gatewayEndpoint": "tcp://localhost:1235",
    "conditions": [{"type": "Ignored", "status": "True", "message": "spec.tls is [not] read"}],
}


def test_status_shows_the_pools_of_the_namespace_in_the_command_line(bkpool_here, api, appliance):
    pools = [{"namespace": "default", "name": "a"}, {"namespace": "team", "name": "b"}]
    api.answers["pools"] = (200, {"pools": pools})
    assert json.loads(bkpool_here("status", "-n", "team").stdout) == {"pools": pools[1:]}
    assert json.loads(bkpool_here("status", "-n", "none").stdout) == {"pools": []}
    assert json.loads(bkpool_here("status", BKCTL_NAMESPACE="team").stdout) == {"pools": pools}


@pytest.mark.parametrize(
    "value", ["junk", "http://gw:9", "gw:0", "tcp://gw", "tcp://gw:99999", "tcp://me@gw:9", "g w:9"]
)
def test_a_gateway_endpoint_that_buildx_cannot_use_is_refused(bkpool_here, api, appliance, value):
    done = bkpool_here("allocate", BKCTL_GATEWAY_ENDPOINT=value)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: BKCTL_GATEWAY_ENDPOINT: '{value}' is not of the form tcp://HOST:PORT\n")
    assert api.calls.empty()


@pytest.mark.parametrize("value", ["gw:9", "tcp://[::1]:1235", "tcp://10.0.0.1:1235"])
def test_a_given_gateway_endpoint_replaces_that_of_the_answer(bkpool_here, api, appliance, value):
    done = bkpool_here("allocate", BKCTL_GATEWAY_ENDPOINT=value)
    assert json.loads(done.stdout)["gatewayEndpoint"] == value


def test_status_draws_a_table_on_a_terminal_and_writes_json_elsewhere(bkpool_here, on_terminal, api, appliance):
    api.answers["pools"] = (200, {"pools": [POOL]})
    assert json.loads(bkpool_here("status").stdout) == {"pools": [POOL]}
    code, shown = on_terminal("status")
    assert code == 0
    assert "1 of 4" in shown
    assert "spec.tls is [not] read" in shown
    assert json.loads(on_terminal("status", "--json")[1]) == {"pools": [POOL]}


def test_status_of_one_pool_lists_its_workers(on_terminal, api, appliance):
    worker = {"name": "default-worker-0", "phase": "Allocated", "jobId": "j[1]", "expiresAt": "2099-01-01T00:00:00Z"}
    api.answers["default"] = (200, POOL | {"members": [worker]})
    _, shown = on_terminal("status", "-p", "default", "-n", "team")
    assert api.next().path.endswith("/pools/default?namespace=team")
    assert "default-worker-0  Allocated  j[1]" in shown


def test_a_reader_that_ends_early_causes_no_traceback(started, api, appliance):
    api.answers["pools"] = (200, {"pools": [POOL] * 2000})
    process = started("status")
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(TIMEOUT) == 1
    assert process.stderr.read() == ""


def test_bkctl_is_the_same_program_under_its_older_name(environment, tmp_path):
    script = tmp_path / "bkctl"
    script.write_text("from bkpool.cli import main\nmain()\n")
    python = Path(__import__("sys").executable)
    command = [python, script, "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=LONGEST_RUN)
    assert done.stdout.startswith("bkctl ")
