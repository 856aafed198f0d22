"""The GitHub Action and the GitLab snippet as their platforms run them, against a real appliance.

The development issuer stands for the platform: it answers as GitHub's runner service does. A small interpreter of the
YAML stands for the runner. It uses real node, real bash, the real files of the repository and the runner's protocol.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import uuid
import zipfile
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import Appliance, Context, eventually, free_port, only_on, run

ROOT = Path(__file__).parents[1]
POOL = "ci"


@pytest.fixture(scope="module")
def platform(tmp_path_factory, tools, world, registry_host):
    """An appliance whose issuer stands for the CI platform."""
    appliance = Appliance(tmp_path_factory.mktemp("ci"), tools, world=world)
    port = free_port()
    url = f"https://127.0.0.1:{appliance.ports['api']}"
    options = ("--dev-issuer", "--dev-issuer-address", f"127.0.0.1:{port}", "--api-tls", "--external-url", url)
    spec = {"scaling": {"min": 0, "max": 2}, **world.trusting(registry_host)}
    described = appliance.up_with(spec, *options, name=POOL)
    yield appliance, described
    appliance.finish()


of_the_job = only_on(
    "process", "it is about files and programs of the job; other tests of this module lease and build"
)


@dataclass
class Job:
    """One job on a runner: its files, the output of its steps, and their post steps."""

    env: dict[str, str]
    temp: Path
    workspace: Path
    log: str = ""
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    states: list[tuple[Path, dict[str, str], dict[str, str]]] = field(default_factory=list)

    def action(self, inputs: dict[str, str]) -> int:
        """Runs the composite action at the top of the repository, up to the first step that fails."""
        action = yaml.safe_load((ROOT / "action.yml").read_text())
        assert action["runs"]["using"] == "composite"
        assert set(inputs) <= set(action["inputs"])
        given = self._inputs(action, inputs)
        for step in action["runs"]["steps"]:
            code = self._uses(step, given) if "uses" in step else self._runs(step, given)
            if code:
                return code
        self.outputs["action"] = {name: self._filled(o["value"], given) for name, o in action["outputs"].items()}
        return 0

    def ends(self) -> int:
        """Runs the post steps, which also run after a failure."""
        codes = [
            self._step(["node", str(where / "post.js")], env | {f"STATE_{k}": v for k, v in state.items()})
            for where, env, state in reversed(self.states)
        ]
        self.states.clear()
        return max(codes, default=0)

    def _uses(self, step: dict[str, Any], given: dict[str, str]) -> int:
        where = ROOT / step["uses"].removeprefix("$/")
        action = yaml.safe_load((where / "action.yml").read_text())
        assert action["runs"] == {"using": "node20", "main": "main.js", "post": "post.js", "post-if": "always()"}
        inputs = self._inputs(action, {name: self._filled(text, given) for name, text in step["with"].items()})
        env = {f"INPUT_{name.upper().replace(' ', '_')}": value for name, value in inputs.items()}
        files = {name: self._file() for name in ("GITHUB_OUTPUT", "GITHUB_STATE")}
        code = self._step(["node", str(where / "main.js")], env | {name: str(file) for name, file in files.items()})
        self.outputs[step["id"]] = _pairs(files["GITHUB_OUTPUT"])
        assert set(self.outputs[step["id"]]) <= set(action["outputs"])
        self.states.append((where, env, _pairs(files["GITHUB_STATE"])))
        return code

    def _runs(self, step: dict[str, Any], given: dict[str, str]) -> int:
        assert "${{" not in step["run"], "an expression in a script is an injection"
        script = self._file(step["run"])
        env = {name: self._filled(text, given) for name, text in step.get("env", {}).items()}
        shell = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(script)]
        return self._step(shell, env | {"GITHUB_PATH": str(self._file())})

    def _step(self, argv: list[str], env: dict[str, str]) -> int:
        answer = run(*argv, env=self.env | env, cwd=self.workspace, timeout=900)  # one step installs packages
        self.log += answer.text
        return answer.code

    def _inputs(self, action: dict[str, Any], given: dict[str, str]) -> dict[str, str]:
        missing = [n for n, about in action["inputs"].items() if about.get("required") and n not in given]
        assert not missing
        return {name: given.get(name, about.get("default", "")) for name, about in action["inputs"].items()}

    def _filled(self, text: str, inputs: dict[str, str]) -> str:
        def value(match: re.Match[str]) -> str:
            match match[1].split("."):
                case ["inputs", name]:
                    return inputs[name]
                case ["github", "action_path"]:
                    return str(ROOT)
                case ["steps", step, "outputs", name]:
                    return self.outputs[step][name]
            raise AssertionError(f"unknown expression {match[1]}")

        return re.sub(r"\$\{\{ ([a-z0-9._-]+) \}\}", value, text)

    def _file(self, content: str = "") -> Path:
        file = self.temp / f"_{uuid.uuid4().hex}"
        file.write_text(content)
        return file

    def left(self) -> list[str]:
        """Returns the files in the runner's temporary directory, without those of the runner itself."""
        return [file.name for file in self.temp.iterdir() if not file.name.startswith("_")]


def _pairs(file: Path) -> dict[str, str]:
    """Reads `name<<delimiter` blocks as the runner does."""
    return {m[1]: m[3] for m in re.finditer(r"^(\w+)<<(\S+)\n(.*?)\n\2$", file.read_text(), re.MULTILINE | re.DOTALL)}


@pytest.fixture
def job(platform, tmp_path):
    """Starts jobs of octo-org/octo-repo, whose only credentials are those from the platform."""
    appliance, _ = platform
    made = []

    def start(**more: str) -> Job:
        temp, workspace, home = (tmp_path / name for name in ("temp", "workspace", "empty-home"))
        for directory in (temp, workspace, home):
            directory.mkdir(exist_ok=True)
        env = {
            **appliance.env,
            "BKPOOL_HOME": str(home),
            "RUNNER_TEMP": str(temp),
            "GITHUB_ACTIONS": "true",
            "GITHUB_RUN_ID": "4711",
            "GITHUB_JOB": "build",
            **more,
        }
        made.append(Job(env, temp, workspace))
        return made[-1]

    yield start
    for one in made:
        one.ends()
    try:
        eventually(lambda: pool(appliance)["allocated"] == 0, "every lease has ended")
    except AssertionError:
        appliance.cli("revoke", "--pool", POOL)  # the next test needs the workers
        raise


def github(described: dict[str, Any]) -> dict[str, str]:
    return {
        "ACTIONS_ID_TOKEN_REQUEST_URL": f"{described['devIssuer']}/actions/token?api-version=2.0&actor=octocat",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "of-the-runner",
    }


def inputs(described: dict[str, Any], **more: str) -> dict[str, str]:
    return {"endpoint": described["apiEndpoint"], "pool": POOL, "ca-cert": described["apiCa"], **more}


def pool(appliance: Appliance) -> dict[str, Any]:
    return appliance.cli("status", "-p", POOL).ok().json


def leased(appliance: Appliance) -> list[dict[str, Any]]:
    return [worker for worker in pool(appliance)["members"] if worker.get("requestedBy")]


def test_a_job_builds_on_its_worker_and_releases_it(platform, job, program):
    appliance, described = platform
    running = job(**github(described))
    assert running.action(inputs(described)) == 0, running.log
    [worker] = leased(appliance)
    assert worker["requestedBy"] == "octocat"
    assert worker["jobId"].startswith("4711-build-")
    outputs = running.outputs["action"]
    assert outputs["worker"] == worker["name"]
    assert outputs["gateway"] == described["gatewayEndpoint"]
    lease = json.loads(next(running.temp.glob("bkpool-lease-*/lease.json")).read_text())
    assert running.log.count(lease["token"]) == running.log.count(f"::add-mask::{lease['token']}\n") == 1
    assert "PRIVATE KEY" not in running.log
    context = Context(running.workspace / "context", program).dockerfile("say of-the-action")
    run(
        "docker", "buildx", "build", context, env=running.env, cwd=running.workspace
    ).ok()  # the builder that the action has selected
    assert running.ends() == 0
    eventually(lambda: not leased(appliance), "the worker is released")
    assert running.left() == []
    assert outputs["builder"] not in run("docker", "buildx", "ls", env=running.env).out


@of_the_job
def test_the_action_accepts_its_optional_inputs(platform, job):
    _, described = platform
    running = job(**github(described))
    text = Path(described["apiCa"]).read_text()
    more = {"builder": "mine", "ttl": "30m", "namespace": "default", "wait": "2m"}
    assert running.action(inputs(described, **more) | {"ca-cert": text}) == 0, running.log
    assert running.outputs["action"]["builder"] == "mine"
    assert "mine" in run("docker", "buildx", "ls", env=running.env).out
    assert running.ends() == 0
    assert "mine" not in run("docker", "buildx", "ls", env=running.env).out


@of_the_job
def test_the_action_installs_its_own_source_and_what_the_lock_pins(platform, job, tmp_path):
    """The attack: an index, or a directory of wheels, offers a newer bkpool and a newer click."""
    _, described = platform
    offered = tmp_path / "offered"
    offered.mkdir()
    for name, version in (("bkpool", "99.0"), ("click", "8.99.0")):
        wheel(offered, name, version)
    running = job(**github(described), PYTHONPATH="")
    of_machine = {
        name: value for name, value in os.environ.items() if name.startswith("PIP_") or "proxy" in name.lower()
    }
    running.env |= of_machine | {"PIP_FIND_LINKS": f"{offered} {of_machine.get('PIP_FIND_LINKS', '')}"}
    running.env["PATH"] = os.pathsep.join(
        entry for entry in running.env["PATH"].split(os.pathsep) if not (Path(entry) / "bkpool").exists()
    )
    (running.workspace / "pip.py").write_text("raise SystemExit('a module of the workspace')")
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    assert running._runs(action["runs"]["steps"][0], {}) == 0, running.log
    python = running.temp / "bkpool" / "bin" / "python"
    shown = run(python, "-I", "-m", "pip", "list", "--format", "json", env=running.env).ok().json
    versions = {package["name"]: package["version"] for package in shown}
    assert versions["bkpool"] == metadata.version("bkpool")
    assert f"click=={versions['click']} " in (ROOT / "requirements-install.lock").read_text()
    run(python.with_name("bkpool"), "version", env=running.env).ok()


def wheel(directory: Path, name: str, version: str) -> None:
    """Makes a package with nothing in it."""
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}/__init__.py", "")
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")


@of_the_job
def test_an_existing_builder_is_not_removed(platform, job):
    appliance, described = platform
    running = job(**github(described))
    run("docker", "buildx", "create", "--name", "before", "--driver", "remote", "tcp://x:1", env=running.env).ok()
    assert running.action(inputs(described, builder="before")) != 0
    assert running.ends() == 0
    assert "before" in run("docker", "buildx", "ls", env=running.env).out
    run("docker", "buildx", "rm", "before", env=running.env).ok()
    eventually(lambda: not leased(appliance), "the worker is released")


@of_the_job
def test_the_error_of_a_job_without_the_permission_names_it(platform, job):
    _, described = platform
    running = job()
    assert running.action(inputs(described)) == 1
    assert "id-token: write" in running.log
    assert "::error::no worker was leased" in running.log
    assert running.ends() == 0
    assert running.left() == []


@of_the_job
def test_a_failed_release_does_not_fail_the_job(platform, job):
    _, described = platform
    running = job(**github(described))
    assert running.action(inputs(described)) == 0, running.log
    [(where, env, state)] = running.states
    running.states[:] = [(where, env | {"INPUT_ENDPOINT": "https://127.0.0.1:1"}, state)]
    lease = json.loads(next(running.temp.glob("bkpool-lease-*/lease.json")).read_text())
    assert running.ends() == 0
    assert "::warning::the worker is not released" in running.log
    assert running.left() == []
    platform[0].release(lease).ok()


@of_the_job
def test_a_job_that_is_cancelled_while_it_waits_leaves_nothing(platform, job):
    """The runner sends the signal only to node, which must forward it to bkpool."""
    appliance, described = platform
    held = [appliance.cli("allocate", "-p", POOL).ok().json for _ in range(2)]
    running = job(**github(described))
    state = running._file()
    env = running.env | {f"INPUT_{name.upper()}": value for name, value in inputs(described, builder="").items()}
    env |= {"GITHUB_STATE": str(state), "GITHUB_OUTPUT": str(running._file())}
    process = subprocess.Popen(
        ["node", ROOT / "actions" / "lease" / "main.js"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    with process:
        eventually(lambda: pool(appliance)["waiting"] == 1, "the job waits in the queue")
        process.send_signal(signal.SIGINT)
        output = process.stdout.read().decode()
    assert process.returncode == 1, output
    assert "bkpool ended with exit code 130" in output
    eventually(lambda: pool(appliance)["waiting"] == 0, "the job has left the queue")
    running.states.append((ROOT / "actions" / "lease", env, _pairs(state)))
    assert running.ends() == 0
    assert running.left() == []
    for lease in held:
        appliance.release(lease).ok()


@only_on("process", "the commands are the same for every backend; test_access.py names leases by their workers there")
def test_a_user_can_do_the_same_by_hand(platform, tmp_path):
    """It shows tokens of the issuer, what they grant, and a lease that is named by its worker."""
    appliance, described = platform
    mine, yours = (appliance.cli("oidc-token", "--actor", who).ok().out.strip() for who in ("me", "you"))
    (tmp_path / "token").write_text(mine)
    check = appliance.cli("auth", "check", "--token-file", str(tmp_path / "token"), "-p", POOL).ok().json
    assert (check["allowed"], check["identity"]["name"]) == (True, "me")
    assert check["identity"]["authority"] == described["devIssuer"]
    (tmp_path / "token").write_text("of-nobody")
    assert appliance.cli("auth", "check", "--token-file", str(tmp_path / "token"), "-p", POOL).code == 3
    lease = appliance.cli("allocate", "-p", POOL, BKCTL_TOKEN=mine).ok().json
    worker = ("--worker", lease["workerName"])
    assert appliance.cli("release", *worker, BKCTL_TOKEN=yours).code == 5
    appliance.cli("renew", *worker, "--ttl", "2h", BKCTL_TOKEN=mine).ok()
    appliance.cli("release", *worker, "--oidc-actor", "me").ok()
    eventually(lambda: not leased(appliance), "the worker is released")


def gitlab(platform, job, name: str, registry: str) -> tuple[int, Job]:
    """Runs a job of the example as GitLab's runner does: its script, and then its after_script in another shell."""
    appliance, described = platform
    example = yaml.safe_load((ROOT / "examples" / "gitlab-ci.yml").read_text())
    wanted = {**example[".bkpool"], **example[name]}
    [(variable, about)] = wanted["id_tokens"].items()
    assert about == {"aud": example["variables"]["BKCTL_ENDPOINT"]}
    token = appliance.cli(
        *("oidc-token", "--actor", "gitlab-user", "--duration", "5m"),
        *("--claim", "project_path=group/project"),
    )
    running = job(
        **{variable: token.ok().out.strip()},
        BKCTL_ENDPOINT=described["apiEndpoint"],
        BKCTL_TLS_CA_CERT=described["apiCa"],
        CI_REGISTRY_IMAGE=f"{registry}/group/project",
        CI_COMMIT_SHORT_SHA="deadbeef",
        CI_JOB_ID="7",
    )
    running.env["CI_PROJECT_DIR"] = str(running.workspace)
    Path(f"{running.workspace}.tmp").mkdir()
    (running.workspace / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    codes = []
    for part in ("script", "after_script"):
        script = running._file("set -eo pipefail\n" + "\n".join(wanted.get(part, [])))
        codes.append(running._step(["bash", str(script)], {}))
    return max(codes), running


@pytest.mark.parametrize("name", ["build", pytest.param("build-in-steps", marks=of_the_job)])
def test_the_example_for_gitlab_runs_unchanged(platform, job, name, registry_host):
    appliance, _ = platform
    code, running = gitlab(platform, job, name, registry_host)
    assert code == 0, running.log
    assert list(Path(f"{running.workspace}.tmp").iterdir()) == []
    eventually(lambda: not leased(appliance), "the worker is released")
    assert "bkpool-7" not in run("docker", "buildx", "ls", env=running.env).out
