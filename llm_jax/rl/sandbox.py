"""Runs code that a model wrote, and tests of it, in a process that is limited and then ended.

Where Linux gives namespaces (as root, or where users may have their own), the code has no network,
sees no process but itself, can write to no file outside a small folder in memory, and nothing that
it starts outlives it. Elsewhere only the limits of time, memory, file size and processes hold, and
it can read, write and reach what its user can. The tests share a process with the code, so code
that is written to deceive them can; that it ends the process or prints a verdict is no success.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_HARNESS = Path(__file__).with_name("sandbox_harness.py")
_NAMESPACES = ("unshare", "--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child")
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "LANG")  # everything else may be a secret
_MAX_OUTPUT = 1 << 20  # bytes of any file that the code writes


@dataclasses.dataclass(frozen=True)
class Limits:
    """seconds: by the clock, and of computing. memory_mb: of address space, in MiB."""

    seconds: float = 5.0
    memory_mb: int = 512


def run(code: str, tests: Sequence[str], limits: Limits) -> list[bool]:
    """Whether each test raises nothing after the code, run one after the other in one process.

    Code that raises passes none. At the limits the process is ended; tests that are not through by
    then have not passed. Neither code nor tests can start processes or threads, read input or print
    (their output is dropped).

    Raises:
      RuntimeError: the sandbox itself did not start.
    """
    return _run(isolation(), code, tests, limits)


@functools.cache
def isolation() -> tuple[str, ...]:
    """The command that puts a process into namespaces of its own; empty where none does."""
    for command in (_NAMESPACES, (*_NAMESPACES, "--user", "--map-root-user")):
        with contextlib.suppress(RuntimeError):
            if _run(command, "import math", ["math.pi"], Limits(30.0)) == [True]:
                return command
    return ()


def _run(
    namespaces: tuple[str, ...], code: str, tests: Sequence[str], limits: Limits
) -> list[bool]:
    nonce = secrets.token_hex(16)  # what the harness says and nobody else can
    program = {
        "nonce": nonce,
        "code": code,
        "tests": list(tests),
        "isolated": bool(namespaces),
        "seconds": math.ceil(limits.seconds),
        "memory": limits.memory_mb << 20,
        "output": _MAX_OUTPUT,
    }
    with (
        tempfile.TemporaryDirectory(prefix="unit_tests-") as folder,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as verdict,
        tempfile.TemporaryFile() as complaints,
    ):
        os.chmod(folder, 0o755)  # for the user that the code runs as
        given.write(json.dumps(program).encode())
        given.seek(0)
        command = [*namespaces, sys.executable, "-P", "-s", "-B", str(_HARNESS)]
        _execute(command, folder, (given, verdict, complaints), limits.seconds)
        verdict.seek(0)
        said = set(verdict.read(_MAX_OUTPUT).decode(errors="replace").splitlines())
        complaints.seek(0)
        reason = complaints.read(_MAX_OUTPUT).decode(errors="replace").splitlines()
    if f"{nonce} ready" not in said:
        why = reason[-1] if reason else f"it was ended after {limits.seconds:g} s"
        raise RuntimeError(f"the sandbox did not start: {why}")
    return [f"{nonce} {place}" in said for place in range(len(tests))]


def _execute(
    command: Sequence[str], folder: str, streams: tuple[IO, IO, IO], seconds: float
) -> None:
    """Runs the command until it ends or the time is over; then nothing of it is left."""
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment |= {"HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    given, verdict, complaints = streams
    try:
        process = subprocess.Popen(
            command,
            stdin=given,
            stdout=verdict,
            stderr=complaints,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise RuntimeError(f"the sandbox did not start: {error}") from error
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    finally:
        # All of its group: what it started may outlive it. A group that is gone needs nothing.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
