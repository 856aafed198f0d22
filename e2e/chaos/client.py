"""A client that leases, builds and releases in a loop, and records its requests, their answers and its builds.

It behaves as a CI job should. If an answer was lost, it repeats the request with the same jobId. If a build failed,
it builds again on the same lease. It judges nothing: history.py does that.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import select
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from http import HTTPStatus
from itertools import count
from pathlib import Path
from typing import Any

from chaos.history import HUNG, Event

from harness import Appliance, Certificates

WAIT = 60.0
"""Seconds that a client waits for a worker (`wait` of the request)."""
RETRY_PAUSE = 0.25
"""Seconds before a client repeats a request."""
HANG_UPS = 0.3
"""The share of jobs before which the client asks for a worker and hangs up."""
TRIES = 3
"""The most builds on one lease. The client stops after one that succeeds."""
SHORTEST, LONGEST = 0.2, 3.0
"""Limits for the seconds that the one step of a build takes."""
_FIRST_LINE = "[internal] load build definition"  # the first line that comes from BuildKit itself


class Record:
    """The history of a run in progress: in memory, and in a file that gets a line for each event."""

    def __init__(self, file: Path) -> None:
        self.events: list[Event] = []
        self._begun = time.monotonic()
        self._lock = threading.Lock()
        self.file = file
        self._file = file.open("w", buffering=1)
        self._calls = count(1)
        self.over = False
        """If it is set, further events of clients are not recorded, and end their threads."""

    def now(self) -> float:
        """Seconds since the run began."""
        return round(time.monotonic() - self._begun, 3)

    def note(self, who: str, what: str, **of: Any) -> Event:
        with self._lock:
            if self.over and who != "driver":
                raise SystemExit  # ends the client's thread
            event = Event(self.now(), who, what, of)
            self.events.append(event)
            self._file.write(
                json.dumps({"at": event.at, "who": who, "what": what, "of": of}, ensure_ascii=False) + "\n"
            )
            return event

    def call(self) -> str:
        """Returns a new id for a request. Its answer is recorded with the same id."""
        return f"call-{next(self._calls)}"

    def close(self) -> None:
        self._file.close()


@dataclass
class Client:
    """One client of the run.

    Args:
        name: `<tenant>.<number>`.
        bearer: Returns a token that identifies the tenant to the API.
        appliance: The appliance whose API and gateway are used.
        record: Receives all events.
        directory: For build contexts, keys and the output of failed builds. No other client uses it.
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
        """Builds until `done` is set, and then until one more build has succeeded."""
        try:
            chance = random.Random(f"{self.seed}/{self.name}")
            for number in count(1):
                last = self.done.is_set()
                if self._job(f"{self.name}.{number}", chance.uniform(SHORTEST, self.longest), chance) and last:
                    return
        except Exception as error:
            self.record.note(self.name, "wrong", text=f"the client {self.name} itself failed: {error!r}")
            raise

    def _job(self, job: str, seconds: float, chance: random.Random) -> bool:
        if chance.random() < HANG_UPS:
            self._hang_up(job, chance)
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

    def _hang_up(self, job: str, chance: random.Random) -> None:
        """Asks for a worker and resets the connection at a random byte of the request or of the answer.

        A caller that leaves before an answer can be there has no jobId in half of the cases. Then nobody can ever use
        the lease, so it must not stay. All others ask again with the same jobId, as `_allocate` does after this.
        """
        reads = chance.choice([0, 0, chance.randrange(1, 4000)])
        named = bool(reads) or chance.random() < 0.5
        body = json.dumps(
            {"poolName": "default", "wait": f"{WAIT:.0f}s", "ttl": "1h"} | ({"jobId": job} if named else {})
        ).encode()
        head = (
            f"POST /api/v1/workers/allocate HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self.bearer()}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        request = head.encode() + body
        sent = chance.randrange(len(request)) if not reads and chance.random() < 0.3 else len(request)
        self.record.note(self.name, "hang-up", sent=sent, of=len(request), reads=reads, named=named)
        with (
            suppress(OSError),
            socket.create_connection(("127.0.0.1", self.appliance.ports["api"]), 10) as connection,
        ):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
            connection.sendall(request[:sent])
            connection.settimeout(1.0 if reads else chance.uniform(0.0, 0.08 if named else 0.01))
            while reads > 0 and (got := connection.recv(reads)):
                reads -= len(got)
            select.select([], [], [], 0 if reads else connection.gettimeout())

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
            time.sleep(RETRY_PAUSE)

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
            time.sleep(RETRY_PAUSE)

    def _post(self, verb: str, body: dict[str, Any], timeout: float) -> tuple[str, dict[str, Any]]:
        """Makes one call. Returns its outcome and the answer.

        The outcome is "answered", "over" (the lease has ended), "refused" (with the error), or "cut" (no answer).
        """
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
        """Builds once. Returns whether the build succeeded, and whether the lease has ended."""
        place = self.directory / name
        lease = certificates.lease
        env = {**self.appliance.env, "BUILDX_CONFIG": str(place / "buildx")}
        argv = self._prepare(place, name, certificates, seconds, env)
        worker = lease["workerName"]
        self.record.note(self.name, "build", build=name, lease=_name(lease), worker=worker, seconds=round(seconds, 2))
        process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        kill_timer = threading.Timer(HUNG, process.kill)
        kill_timer.start()
        connected, lines = None, []
        with process:
            for line in process.stdout:
                lines.append(line)
                if connected is None and _FIRST_LINE in line:
                    connected = self.record.now()
        hung = not kill_timer.is_alive()
        kill_timer.cancel()
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
            before=_witnessed(output, "before"),
            beside=_witnessed(output, "beside"),
        )
        if not ok:
            (self.directory / f"{name}.log").write_text(output)
        shutil.rmtree(place)
        return ok, over

    def _prepare(
        self, place: Path, name: str, certificates: Certificates, seconds: float, env: dict[str, str]
    ) -> list[str]:
        """Makes the build context and the builder. Returns the command line of the build."""
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
    """Returns the error that a failed build shows at the end."""
    errors = [line for line in output.splitlines() if line.startswith("ERROR: ")]
    return errors[-1] if errors else "\n".join(output.splitlines()[-3:])


def _witnessed(output: str, what: str) -> list[str]:
    """Returns the builds that the step in the worker has seen in its cache."""
    found = re.search(rf"^#\d+ [\d.]+ witness {what}: ?(.*)$", output, re.MULTILINE)
    return found[1].split() if found else []


def _name(lease: dict[str, Any]) -> str:
    """Returns the name of a lease in the history, which must not contain tokens."""
    return sha256(lease["token"].encode()).hexdigest()[:12]
