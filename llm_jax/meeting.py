"""The meeting of the processes of a run, at whose end all of them know that they run the same.

They meet at the coordinator's address before JAX is touched, because JAX ends a process whose peers
do not come without a word that helps. Process 0 listens there; the others tell it what they run:
every leaf of the config, every file of this package by its hash, the versions of the libraries. It
answers when all have come. So a run of processes that differ ends at once, in all of them, with a
line that says in what. Then the port is JAX's.

A message is a line of JSON: {"process", "processes", "description"}, and {"refused": null or why}.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.config import flatten, resolved
from llm_jax.errors import UserError

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
MEND = "start all processes with one command line, the same code and the same libraries."

_RETRY = 0.2  # seconds between two knocks at the coordinator's door
_GREETING = 10.0  # seconds that a caller has to say who it is
_LONGEST = 1 << 24  # bytes of a message


@dataclasses.dataclass(frozen=True)
class Seat:
    """Where a process sits among several: process 0 at `host`, this one with its number.

    launcher: JAX's name of what told it; None = flags or environment.
    """

    host: str
    port: int
    processes: int
    process: int
    launcher: str | None

    @property
    def coordinator(self) -> str:
        return f"{self.host}:{self.port}"


def meet(seat: Seat, description: Mapping[str, str], timeout: float) -> None:
    """Waits until all processes have come and process 0 has compared what they run.

    Raises:
      UserError: a process that does not come in time, two of one number, or processes that run
        different things; the same line in all that have come.
    """
    if seat.process:
        _come(seat, description, timeout)
    else:
        _wait(seat, description, timeout)


@dataclasses.dataclass(frozen=True)
class _Caller:
    """A process that has come to process 0, and what it said."""

    connection: socket.socket
    host: str
    process: int
    processes: int
    description: dict[str, str]

    @property
    def is_gone(self) -> bool:
        """Whether it has hung up since."""
        self.connection.setblocking(False)
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def answer(self, refused: str | None) -> None:
        try:
            self.connection.settimeout(_GREETING)
            self.connection.sendall(json.dumps({"refused": refused}).encode() + b"\n")
            self.connection.close()
        except OSError:  # it is gone, and its silence will be noticed
            pass


def _wait(seat: Seat, description: Mapping[str, str], timeout: float) -> None:
    callers: list[_Caller] = []
    try:
        server = _listen(seat)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at port {seat.port} of {seat.host} ({error}): name another "
            "port, or end the run that has it."
        ) from error
    deadline = time.monotonic() + timeout
    with server:
        while len(callers) < seat.processes - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, address = server.accept()
            except TimeoutError:
                break
            caller = _greet(connection, address[0])
            callers = [c for c in callers if not c.is_gone] + ([caller] if caller else [])
    refused = _verdict(seat, description, callers, timeout)
    for caller in callers:
        caller.answer(refused)
    if refused is not None:
        raise UserError(refused)


def _listen(seat: Seat) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", seat.port), family=socket.AF_INET6, backlog=seat.processes, dualstack_ipv6=True
        )
    return socket.create_server(("", seat.port), backlog=seat.processes)


def _greet(connection: socket.socket, host: str) -> _Caller | None:
    """Hears who has come; None = someone else, such as a scan of ports."""
    connection.settimeout(_GREETING)
    try:
        said = json.loads(connection.makefile("rb").readline(_LONGEST))
        return _Caller(connection, host, said["process"], said["processes"], said["description"])
    except (OSError, ValueError, KeyError, TypeError):
        connection.close()
        return None


def _verdict(
    seat: Seat, description: Mapping[str, str], callers: list[_Caller], timeout: float
) -> str | None:
    """Why the run cannot start; None = it can."""
    seen = {0: "process 0 itself"}
    for caller in callers:
        if caller.processes != seat.processes:
            return (
                f"process {caller.process} ({caller.host}) is one of {caller.processes} and "
                f"process 0 one of {seat.processes}: give all of them the same --processes."
            )
        if caller.process in seen:
            return (
                f"{caller.host} and {seen[caller.process]} both are process {caller.process}: give "
                "each a --process of its own."
            )
        seen[caller.process] = caller.host
        found = difference(description, caller.description)
        if found is not None:
            return f"process {caller.process} ({caller.host}) differs: {found}; {MEND}"
    missing = [str(number) for number in range(seat.processes) if number not in seen]
    if missing:
        return (
            f"{len(seen)} of {seat.processes} processes came to {seat.coordinator} within "
            f"{timeout:g} s; missing: {', '.join(missing)}. Start them, mend --processes, or raise "
            "--peer_timeout."
        )
    return None


def _come(seat: Seat, description: Mapping[str, str], timeout: float) -> None:
    said = {
        "process": seat.process,
        "processes": seat.processes,
        "description": dict(description),
    }
    with _knock(seat, timeout) as connection:
        # Process 0 may have come just now, and answers after a timeout of its own.
        connection.settimeout(timeout + _GREETING)
        try:
            connection.sendall(json.dumps(said).encode() + b"\n")
            refused = json.loads(connection.makefile("rb").readline(_LONGEST))["refused"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"what answers at {seat.coordinator} is not, or no longer, process 0 of this run: "
                "see what that says, and whether another run has the port."
            ) from error
    if refused is not None:
        raise UserError(refused)


def _knock(seat: Seat, timeout: float) -> socket.socket:
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        try:
            return socket.create_connection((seat.host, seat.port), timeout=max(left, _RETRY))
        except OSError as error:
            if left <= 0:
                raise UserError(
                    f"process {seat.process} of {seat.processes} waited {timeout:g} s for process "
                    f"0 at {seat.coordinator}, the coordinator ({error}): start process 0 there, "
                    "mend --coordinator, or raise --peer_timeout."
                ) from error
        time.sleep(_RETRY)


# --- what a process runs --------------------------------------------------------------------------


def describe(config: Any, workdir: str | Path) -> dict[str, str]:
    """All in which processes of one run must not differ: its name → its value or hash."""
    package = Path(__file__).parent
    files = [f for f in package.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    code = {f.relative_to(package.parent).as_posix(): f.read_bytes() for f in sorted(files)}
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    versions["python"] = ".".join(platform.python_version_tuple()[:2])
    return {
        "--workdir": str(workdir),
        **{f"config.{key}": json.dumps(v) for key, v in flatten(resolved(config)).items()},
        **{f"the version of {name}": version for name, version in versions.items()},
        **{
            f"the hash of {name}": hashlib.sha256(content).hexdigest()[:12]
            for name, content in code.items()
        },
    }


def difference(own: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """What two descriptions differ in, in words; None = in nothing."""
    names = [name for name in {**own, **other} if own.get(name) != other.get(name)]
    if not names:
        return None
    there, here = (side.get(names[0], "absent") for side in (other, own))
    more = f", and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]} is {there} there and {here} on process 0{more}"
