"""Calls into the kernel, and programs that are started.

A failure ends the worker: it would have no network, or one without its rules.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from . import FAILED

T = TypeVar("T")

CLONE_NEWNET, MS_BIND = 0x40000000, 0x1000  # sched.h, mount.h
_NONE_LEFT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
libc = ctypes.CDLL(None, use_errno=True)


def in_thread(work: Callable[[], T]) -> T:
    """Does something in a thread of its own. Only the threads of root could return to the host's network."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0] if results else fail("it cannot be made; the lines above have the reason")


def spawn(command: list[str], stdin: int | None = None) -> int:
    """Starts a program. Returns its process id."""
    actions = [] if stdin is None else [(os.POSIX_SPAWN_DUP2, stdin, 0)]
    try:
        # Python ignores SIGPIPE, and pasta does not start if it inherits that.
        return os.posix_spawn(command[0], command, os.environ, file_actions=actions, setsigdef=[signal.SIGPIPE])
    except OSError as error:
        fail(f"{command[0]} cannot be run: {error.strerror}")


def expect_success(child: int, name: str) -> None:
    """Waits for a program that must succeed."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        fail(f"{name} ended with exit code {code}")


def background(work: Callable[..., None], *arguments: object) -> threading.Thread:
    """Starts a thread that does not keep the program from ending."""
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread


def checked(result: int, what: str) -> int:
    """The result of a call of libc, if it succeeded; `what` is what the call makes."""
    if result < 0:
        fail(f"{what} cannot be made: {os.strerror(ctypes.get_errno())}")
    return result


def say(message: str) -> None:
    """Writes a line into the log of the worker."""
    os.write(2, f"the worker's network: {message}\n".encode())


def fail(message: str) -> NoReturn:
    """Ends the worker."""
    say(message)
    os._exit(FAILED)  # from any thread; everything in the PID namespace ends


def read(path: str) -> str:
    """The text of a file of the kernel; empty if there is none.

    If there is no descriptor or memory left, the worker ends: the file would be taken for one without addresses.
    """
    try:
        return Path(path).read_text()
    except OSError as error:  # no IPv6, for example
        if error.errno in _NONE_LEFT:
            fail(f"{path} cannot be read: {error.strerror}")
        return ""
