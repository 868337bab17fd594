"""Several processes that make one run: how they meet, agree, and part.

Each process has its own devices (a host of a TPU pod, a GPU or a node of a cluster) and runs the
same command. Where a process sits among the others is found, in this order,
  1. in the flags --coordinator, --processes and --process of the command line,
  2. in the environment: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID,
  3. by JAX, from a launcher that says so itself: Open MPI 4 (mpirun), Slurm (srun), Cloud TPU pods,
     TPUs in Kubernetes (a JobSet on GKE).
Other launchers, such as Kubernetes with GPUs or Open MPI 5, set the three variables; see
tools/launch. A process that finds nothing, or that it is the only one, starts as if this file did
not exist.

The processes meet at the coordinator's address before JAX is touched, because JAX ends a process
whose peers do not come without a word that helps. Process 0 listens there; the others tell it what
they run: every leaf of the config, every file of this package by its hash, the versions of the
libraries. It answers when all have come. So a run of processes that differ ends at once, in all of
them, with a line that says in what. Then the port is JAX's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.config import flatten, resolved
from llm_jax.errors import UserError

VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
MEND = "start all processes with one command line, the same code and the same libraries."

_RETRY = 0.2  # seconds between two knocks at the coordinator's door
_GREETING = 10.0  # seconds that a caller has to say who it is
_PARTING = 10.0  # seconds that a process which has failed waits for the others to fail as well
_LONGEST = 1 << 24  # bytes of a message


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process sits among several; None = to be found elsewhere, see the top of the file.

    coordinator: HOST:PORT of process 0, which the others must reach. process: its number, from 0.
    peer_timeout: seconds to wait at the start for processes that have not come yet.
    heartbeat_timeout: seconds of silence after which a process is taken for dead, and JAX ends the
    others.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    peer_timeout: int = 300
    heartbeat_timeout: int = 100


@dataclasses.dataclass(frozen=True)
class Seat:
    """A place that was found. launcher: JAX's name of what told it; None = flags or environment."""

    host: str
    port: int
    processes: int
    process: int
    launcher: str | None

    @property
    def coordinator(self) -> str:
        return f"{self.host}:{self.port}"


def start(place: Place, config: Any, workdir: str | Path) -> None:
    """Joins the other processes of the run, if there are any; before anything else touches JAX.

    Args:
      config: the run's whole config, equal in all processes.
      workdir: the run directory, equal in all processes.

    Raises:
      UserError: places that contradict each other; a process that does not come in time; processes
        that run different things.
    """
    seat = find_seat(place)
    if seat is None:
        return
    meet(seat, describe(config, workdir), place.peer_timeout)
    import jax

    # Its handler of SIGTERM would take the signal from ours; see llm_jax/signals.py.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        seat.coordinator,
        seat.processes,
        seat.process,
        cluster_detection_method=seat.launcher or "deactivate",
        initialization_timeout=place.peer_timeout,
        heartbeat_timeout_seconds=place.heartbeat_timeout,
    )


def is_joined() -> bool:
    """Whether this process is one of several."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def leave(status: int) -> int:
    """Ends a process that has failed, with `status`, while others may be waiting for it.

    JAX would hold it at its exit until the others come to theirs. Where all have failed alike they
    do so at once, and so does this one; else it goes, and its silence ends the others.

    Returns:
      `status`, where nobody waits.
    """
    if is_joined():
        parting = threading.Thread(target=sys.modules["jax"].distributed.shutdown, daemon=True)
        parting.start()
        parting.join(_PARTING)
        if parting.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return status


def wait_for_all(moment: str) -> None:
    """Returns when all processes have called it, with the same name of the moment."""
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(moment)  # at once, where there is one process


def ask_all(value: bool) -> list[bool]:
    """What each process says, in their order; all must call it."""
    import numpy as np
    from jax.experimental import multihost_utils

    return np.atleast_1d(multihost_utils.process_allgather(np.array(value))).tolist()


def check_equal(hashes: Mapping[str, str]) -> None:
    """Sees to it that all processes have made the same of what each of them has read.

    It returns when all have called it.

    Args:
      hashes: by what they are of; the same names in all processes.

    Raises:
      UserError: one differs; in all processes.
    """
    import numpy as np
    from jax.experimental import multihost_utils

    digests = [hashlib.sha256(text.encode()).digest() for text in hashes.values()]
    own = np.array([list(digest) for digest in digests], np.uint8)
    everyones = np.reshape(multihost_utils.process_allgather(own), (-1, *own.shape))
    for process, others in enumerate(everyones):
        for name, first, other in zip(hashes, everyones[0], others, strict=True):
            if not np.array_equal(first, other):
                raise UserError(
                    f"{name} in process {process} is another than in process 0: see that all hosts "
                    "read the same files, and none that change."
                )


# --- where a process sits -------------------------------------------------------------------------


def find_seat(place: Place) -> Seat | None:
    """The seat that the place, the environment or a launcher names; None = the process is alone.

    Raises:
      UserError: some of it is missing, malformed or out of range.
    """
    told: dict[str, Any] = {name: _told(place, name) for name in VARIABLES}
    if told["processes"] == 1:
        return None
    cluster = None
    if None in told.values():
        cluster = _launcher()
    if cluster is not None:
        port = os.environ.get("JAX_COORDINATOR_PORT")
        try:
            found = {
                "coordinator": told["coordinator"]
                or cluster.get_coordinator_address(place.peer_timeout, port),
                "processes": cluster.get_process_count(),
                "process": cluster.get_process_id(),
            }
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"the launcher {cluster.name} does not say where this process sits ({error}): "
                f"set {', '.join(VARIABLES.values())}."
            ) from error
        told = {name: found[name] if told[name] is None else told[name] for name in VARIABLES}
    missing = [name for name in VARIABLES if told[name] is None]
    if len(missing) == len(VARIABLES):
        return None
    if missing:
        given = next(name for name in VARIABLES if name not in missing)
        raise UserError(
            f"--{given} is given and --{missing[0]} is not: one of several processes needs "
            "--coordinator=HOST:PORT, --processes=N and --process=I, or "
            f"{', '.join(VARIABLES.values())}."
        )
    host, _, port = str(told["coordinator"]).rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"--coordinator={told['coordinator']} is no HOST:PORT, such as 10.0.0.2:8476."
        )
    if not 0 <= told["process"] < told["processes"]:
        raise UserError(
            f"--process={told['process']} of --processes={told['processes']}: processes are "
            f"numbered from 0 to {told['processes'] - 1}."
        )
    launcher = None if cluster is None else cluster.name
    return Seat(host.strip("[]"), int(port), told["processes"], told["process"], launcher)


def _told(place: Place, name: str) -> Any:
    """What the flags say, or else the environment."""
    value = getattr(place, name)
    text = os.environ.get(VARIABLES[name])
    if value is not None or not text:
        return value
    if name == "coordinator":
        return text
    if not text.isdigit():
        raise UserError(f"the environment variable {VARIABLES[name]}={text!r} is no number.")
    return int(text)


def _launcher() -> Any:
    """JAX's description of the launcher that started this process as one of several; None = none.

    Kubernetes alone is not asked: every pod would seem to be one of several, and JAX reads the
    others from the cluster's API, which takes a package and a permission.
    """
    from jax._src import clusters

    known = (
        clusters.OmpiCluster,
        clusters.SlurmCluster,
        clusters.GkeTpuCluster,
        clusters.GceTpuCluster,
    )
    present = next((cluster for cluster in known if cluster.is_env_present()), None)
    return present if present is not None and present.get_process_count() > 1 else None


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


# --- the meeting ----------------------------------------------------------------------------------


def meet(seat: Seat, description: Mapping[str, str], timeout: float) -> None:
    """Waits until all processes have come and process 0 has compared what they run.

    Raises:
      UserError: as `start` says; the same line in all processes that have come.
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
