from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from bkpool.workers.processes.runtime import ProcessRuntime
from bkpool.workers.processes.sandbox import Binaries

_PROGRAM = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
int main(int argc, char **argv) {
    printf("the step runs\n");
    fflush(stdout);
    if (argc > 1 && !strcmp(argv[1], "forks")) {
        int n = 0;
        for (; n < 300; n++) { int pid = fork(); if (pid < 0) break; if (!pid) { pause(); return 0; } }
        printf("%d forks\n", n);
        return 0;
    }
    if (argc > 1 && !strcmp(argv[1], "raw")) {
        printf("packet socket: %s\n", socket(AF_PACKET, SOCK_RAW, 0) < 0 ? "refused" : "opened");
        printf("raw socket: %s\n", socket(AF_INET, SOCK_RAW, 1) < 0 ? "refused" : "opened");
        return 0;
    }
    if (argc > 1 && !strcmp(argv[1], "memory")) {
        size_t size = 256 << 20;
        volatile char *taken = malloc(size);
        for (size_t at = 0; at < size; at += 4096) taken[at] = 1;
        printf("took the memory\n");
        return 0;
    }
    if (argc > 1) { fork(); setsid(); sleep(atoi(argv[1])); }
    return 0;
}
"""


@pytest.fixture(scope="session")
def binaries(buildkitd: Path, runc: Path, rootlesskit: Path) -> Binaries:
    return Binaries(buildkitd, runc, rootlesskit)


@pytest.fixture(scope="session")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static program for RUN steps, so that no build needs a registry.

    It forks 300 times (`forks`), takes 256 MiB (`memory`), tries to open raw sockets (`raw`), or forks and sleeps for
    a number of seconds.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a static program for RUN steps")
    source = tmp_path_factory.mktemp("step") / "step.c"
    source.write_text(_PROGRAM)
    subprocess.run([compiler, "-static", "-Os", "-s", "-o", source.with_suffix(""), source], check=True)
    return source.with_suffix("")


Build = Callable[..., Awaitable[asyncio.subprocess.Process]]


@pytest.fixture
def build(buildctl: Path, step: Path, tmp_path: Path) -> Build:
    """Starts a real build of two RUN steps; its output is to be read from `stdout`."""

    async def start(
        endpoint: str, *arguments: str, options: Sequence[str] = (), flags: str = ""
    ) -> asyncio.subprocess.Process:
        context = tmp_path / "context"
        context.mkdir(exist_ok=True)
        shutil.copy2(step, context / "step")
        run = ", ".join(f'"{word}"' for word in ("/step", *arguments))
        (context / "Dockerfile").write_text(
            f'FROM scratch\nCOPY step /step\nRUN ["/step"]\nRUN {flags}{" " if flags else ""}[{run}]\n'
        )
        sources = ["--frontend=dockerfile.v0", f"--local=context={context}", f"--local=dockerfile={context}"]
        return await asyncio.create_subprocess_exec(
            buildctl,
            f"--addr={endpoint}",
            "build",
            "--progress=plain",
            *sources,
            *options,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    return start


def pidfds() -> int:
    return sum("pidfd" in str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())


@pytest.fixture
async def runtime(tmp_path: Path, binaries: Binaries) -> AsyncIterator[ProcessRuntime]:
    """A runtime in a home of its own, that must leave no process and no descriptor."""
    before = pidfds()
    runtime = ProcessRuntime(tmp_path / "home", binaries)
    yield runtime
    await runtime.purge()
    await runtime.close(stop_workers=True)
    assert pidfds() == before
    assert not (tmp_path / "home" / "slots").exists()
