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

They meet (llm_jax/meeting.py) before JAX is touched, and go on only if all of them run the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.errors import UserError
from llm_jax.meeting import Seat, describe, meet

VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}

_MOMENTS = itertools.count()
_PATIENCE = 3600  # seconds that processes wait for one that is alive, such as while it compiles
_PATIENCE_WITH_FAILURES = 600  # seconds; the others may hang where one has failed alone
_PARTING = 10.0  # seconds that a process which has failed waits for the others to fail as well


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
    """Returns when all processes have called it, as often, with the same name of the moment.

    They wait at JAX's coordinator and not for a collective, which has less patience: on CPUs half a
    minute, in which others may still be compiling.
    """
    if is_joined():
        from jax._src.distributed import global_state

        number = next(_MOMENTS)
        client: Any = global_state.client
        client.wait_at_barrier(f"llm_jax/{number}/{moment}", _PATIENCE * 1000)


def ask_all(value: bool) -> list[bool]:
    """What each process says, in their order; all must call it."""
    import numpy as np
    from jax.experimental import multihost_utils

    return np.atleast_1d(multihost_utils.process_allgather(np.array(value))).tolist()


def failures(moment: str, failure: str | None) -> dict[int, str]:
    """What each process that failed at something says of it, by its number; all must call it.

    No collective has a part in it: a process that failed alone asks while the others may still be
    waiting for it in one. On CPUs they give up there after half a minute, fail as well, and come.

    Args:
      moment: what it is, the same in all processes, which come to it equally often.
      failure: one line; None = this process did not fail.

    Raises:
      RuntimeError: the others do not come within ten minutes.
    """
    if not is_joined():
        return {} if failure is None else {0: failure}
    from jax._src.distributed import global_state

    client: Any = global_state.client
    folder = f"llm_jax/failures/{next(_MOMENTS)}"
    if failure is not None:
        client.key_value_set(f"{folder}/{global_state.process_id}", failure)
    try:
        client.wait_at_barrier(f"{folder}/{moment}", _PATIENCE_WITH_FAILURES * 1000)
    except Exception as error:
        raise RuntimeError(f"{moment}: {failure or 'not all processes come to its end'}") from error
    said = client.key_value_dir_get(f"{folder}/")
    return {int(key.rpartition("/")[2]): text for key, text in sorted(said)}


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
    launcher = None
    if None in told.values():
        launcher, found = _launcher(place, told["coordinator"])
        told = {name: found.get(name) if told[name] is None else told[name] for name in VARIABLES}
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


def _launcher(place: Place, coordinator: str | None) -> tuple[str | None, dict[str, Any]]:
    """The launcher that started this process as one of several, by JAX's name, and what it says of
    the process's place; None and nothing where there is none.

    Kubernetes alone is not asked: every pod would seem to be one of several, and JAX reads the
    others from the cluster's API, which takes a package and a permission.

    Raises:
      UserError: it does not say.
    """
    from jax._src import clusters

    known = (
        clusters.OmpiCluster,
        clusters.SlurmCluster,
        clusters.GkeTpuCluster,
        clusters.GceTpuCluster,
    )
    name = "of this machine"
    try:
        present = next((cluster for cluster in known if cluster.is_env_present()), None)
        if present is None or present.get_process_count() == 1:
            return None, {}
        name, port = present.name, os.environ.get("JAX_COORDINATOR_PORT")
        return name, {
            "coordinator": coordinator or present.get_coordinator_address(place.peer_timeout, port),
            "processes": present.get_process_count(),
            "process": present.get_process_id(),
        }
    # The metadata server of a TPU is asked over the network.
    except (RuntimeError, ValueError, KeyError, OSError, ImportError) as error:
        raise UserError(
            f"the launcher {name} does not say where this process sits ({error}): set "
            f"{', '.join(VARIABLES.values())}, or {VARIABLES['processes']}=1 where it is alone."
        ) from error
