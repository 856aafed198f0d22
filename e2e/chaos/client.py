"""A client that leases, builds and releases in a loop, and writes down what it asked, what it got and what it saw.

It behaves as a CI job should: it asks again with the same jobId where an answer was lost, and tries a build again on
the same lease. It judges nothing; history.py does.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from http import HTTPStatus
from itertools import count
from pathlib import Path
from typing import Any

from chaos.history import HUNG, Event

from harness import Appliance, Certificates

WAIT = 60.0
"""Seconds for which a client is willing to stand in line."""
AGAIN = 0.25
"""Seconds before a client asks again."""
TRIES = 3
"""Builds on one lease, until one succeeds."""
SHORTEST, LONGEST = 0.2, 3.0
"""Seconds that the one step of a build takes."""
_BEGUN = "[internal] load build definition"  # the first that BuildKit itself says


class Record:
    """The history as it is being made: in memory, and a line at a time in a file."""

    def __init__(self, file: Path) -> None:
        self.events: list[Event] = []
        self._begun = time.monotonic()
        self._lock = threading.Lock()
        self.file = file
        self._file = file.open("w", buffering=1)
        self._calls = count(1)
        self.over = False
        """What clients do from now on is no part of it, and ends them."""

    def now(self) -> float:
        """Seconds since the run began."""
        return round(time.monotonic() - self._begun, 3)

    def note(self, who: str, what: str, **of: Any) -> Event:
        with self._lock:
            if self.over and who != "driver":
                raise SystemExit  # of the client's thread
            event = Event(self.now(), who, what, of)
            self.events.append(event)
            self._file.write(
                json.dumps({"at": event.at, "who": who, "what": what, "of": of}, ensure_ascii=False) + "\n"
            )
            return event

    def call(self) -> str:
        """A name for a question, by which its answer is known."""
        return f"call-{next(self._calls)}"

    def close(self) -> None:
        self._file.close()


@dataclass
class Client:
    """One of those who build.

    Args:
        name: `<tenant>.<number>`.
        bearer: Gives a token by which the API knows the tenant.
        appliance: Whose API and gateway are used.
        record: Where everything is written down.
        directory: Its own, for contexts, keys and the output of failed builds.
        program: The test program for the images.
        seed: Decides how long each build takes.
        done: The loop ends when this is set, after one more success.
        longest: Seconds that the step of a build takes at most.
    """

    name: str
    bearer: Callable[[], str]
    appliance: Appliance
    record: Record
    directory: Path
    program: Path
    seed: int
    done: threading.Event
    longest: float = LONGEST

    def run(self) -> None:
        """Builds until told to end, and then until one build more has succeeded."""
        try:
            chance = random.Random(f"{self.seed}/{self.name}")
            for number in count(1):
                last = self.done.is_set()
                if self._job(f"{self.name}.{number}", chance.uniform(SHORTEST, self.longest)) and last:
                    return
        except Exception as error:
            self.record.note(self.name, "wrong", text=f"the client {self.name} itself failed: {error!r}")
            raise

    def _job(self, job: str, seconds: float) -> bool:
        lease = self._allocate(job)
        certificates = Certificates.of(lease, self.directory / "keys")
        succeeded = False
        for attempt in range(1, TRIES + 1):
            succeeded, over = self._build(f"{job}.{attempt}", certificates, seconds)
            if succeeded or over:
                break
        self._release(lease)
        return succeeded

    # --- the API ----------------------------------------------------------------------------------------------------

    def _allocate(self, job: str) -> dict[str, Any]:
        body = {"poolName": "default", "jobId": job, "wait": f"{WAIT:.0f}s", "ttl": "1h"}
        while True:
            call = self.record.call()
            self.record.note(self.name, "ask", call=call, job=job)
            outcome, reply = self._post("allocate", body, WAIT + 20)
            if outcome == "answered":
                of = {"outcome": "lease", "lease": _name(reply), "worker": reply["workerName"]}
                self.record.note(self.name, "answer", call=call, wait=WAIT, **of)
                return reply
            self.record.note(self.name, "answer", call=call, wait=WAIT, outcome=outcome, message=reply["message"])
            time.sleep(AGAIN)

    def _release(self, lease: dict[str, Any]) -> None:
        while True:
            call = self.record.call()
            self.record.note(self.name, "release", call=call, lease=_name(lease))
            outcome, reply = self._post("release", {"token": lease["token"]}, 30)
            outcome = {"answered": "released", "over": "over"}.get(outcome, outcome)
            self.record.note(
                self.name, "released", call=call, wait=10, outcome=outcome, message=reply.get("message", "")
            )
            if outcome in {"released", "over"}:
                return
            time.sleep(AGAIN)

    def _post(self, verb: str, body: dict[str, Any], timeout: float) -> tuple[str, dict[str, Any]]:
        """One call: answered, over (the lease is), refused (with the error), or cut."""
        connection = http.client.HTTPConnection("127.0.0.1", self.appliance.ports["api"], timeout=timeout)
        headers = {"Authorization": f"Bearer {self.bearer()}"}
        try:
            connection.request("POST", f"/api/v1/workers/{verb}", json.dumps(body), headers)
            answer = connection.getresponse()
            reply = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            return "cut", {"message": repr(error)}
        finally:
            connection.close()
        if answer.status == HTTPStatus.OK:
            return "answered", reply
        message = f"{answer.status}: {reply['error']['message']}"
        over = verb == "release" and answer.status in {HTTPStatus.GONE, HTTPStatus.NOT_FOUND, HTTPStatus.UNAUTHORIZED}
        return "over" if over else "refused", {"message": message}

    # --- builds -----------------------------------------------------------------------------------------------------

    def _build(self, name: str, certificates: Certificates, seconds: float) -> tuple[bool, bool]:
        """Builds; returns whether it succeeded, and whether the lease is over."""
        place = self.directory / name
        lease = certificates.lease
        env = {**self.appliance.env, "BUILDX_CONFIG": str(place / "buildx")}
        argv = self._prepare(place, name, certificates, seconds, env)
        worker = lease["workerName"]
        self.record.note(self.name, "build", build=name, lease=_name(lease), worker=worker, seconds=round(seconds, 2))
        process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        giving_up = threading.Timer(HUNG, process.kill)
        giving_up.start()
        connected, lines = None, []
        with process:
            for line in process.stdout:
                lines.append(line)
                if connected is None and _BEGUN in line:
                    connected = self.record.now()
        hung = not giving_up.is_alive()
        giving_up.cancel()
        output = "".join(lines)
        ok = process.returncode == 0
        over = "lease was lost" in output or "lease has" in output or "no lease has" in output
        result = place / "out" / "result"
        self.record.note(
            self.name,
            "build-end",
            build=name,
            lease=_name(lease),
            worker=worker,
            ok=ok,
            hung=hung,
            connected=connected,
            correct=ok and result.exists() and result.read_text() == name,
            sentence="" if ok else sentence(output),
            lost="lease was lost" in output,
            before=_told(output, "before"),
            beside=_told(output, "beside"),
        )
        if not ok:
            (self.directory / f"{name}.log").write_text(output)
        shutil.rmtree(place)
        return ok, over

    def _prepare(
        self, place: Path, name: str, certificates: Certificates, seconds: float, env: dict[str, str]
    ) -> list[str]:
        """The context and the builder; returns the build's command line."""
        context = place / "context"
        context.mkdir(parents=True)
        os.link(self.program, context / "program")
        steps = ["/program", "witness", "/cache/log", name, f"{seconds:.2f}s"]
        lines = [
            "FROM scratch AS built",
            "COPY program /program",
            f"RUN --mount=type=cache,id=chaos,target=/cache {json.dumps(steps)}",
            f"RUN {json.dumps(['/program', 'write', '/result', name])}",
            "FROM scratch",
            "COPY --from=built /result /result",
        ]
        (context / "Dockerfile").write_text("\n".join([*lines, ""]))
        endpoint = f"tcp://localhost:{self.appliance.ports['gateway']}"
        create = (
            "create",
            "--name",
            "chaos",
            "--driver",
            "remote",
            "--driver-opt",
            certificates.driver_opt,
            endpoint,
        )
        docker = ("docker", "buildx")
        subprocess.run([*docker, *create], env=env, check=True, capture_output=True)
        options = ("--builder", "chaos", "--progress", "plain", "--provenance=false", "--output")
        return [*docker, "build", *options, f"type=local,dest={place / 'out'}", str(context)]


def sentence(output: str) -> str:
    """What a failed build told its user in the end."""
    errors = [line for line in output.splitlines() if line.startswith("ERROR: ")]
    return errors[-1] if errors else "\n".join(output.splitlines()[-3:])


def _told(output: str, what: str) -> list[str]:
    """What the step inside the worker has seen."""
    found = re.search(rf"^#\d+ [\d.]+ witness {what}: ?(.*)$", output, re.MULTILINE)
    return found[1].split() if found else []


def _name(lease: dict[str, Any]) -> str:
    """By what a lease is known in the history, where no token may be."""
    return sha256(lease["token"].encode()).hexdigest()[:12]
