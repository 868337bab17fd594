"""How processes find each other and agree; whole runs of several are in test_hosts.py."""

import os
import re
from unittest import mock

import pytest

from llm_jax.distributed import Place, ask_all, check_equal, find_seat, leave
from llm_jax.errors import UserError
from llm_jax.meeting import Seat

SLURM = {
    "SLURM_JOB_ID": "4096",
    "SLURM_STEP_NODELIST": "node[017-020],gpu3",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
VARIABLES = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}


@pytest.fixture
def found():
    """`found(environment, **flags)`: the seat of a process in an environment."""

    def find(environment, **flags):
        prefixes = ("SLURM_", "OMPI_", "JAX_COORD", "JAX_NUM_PROC", "JAX_PROCESS", "TPU_", "MEGA")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
        with mock.patch.dict(os.environ, {**clean, **environment}, clear=True):
            return find_seat(Place(**flags))

    return find


# --- where a process sits -------------------------------------------------------------------------


def test_a_process_that_nothing_says_of_is_alone(found):
    assert found({}) is None
    assert found({}, processes=1) is None
    assert found({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    assert found({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None  # every pod is in a cluster


def test_flags_go_before_variables_and_these_before_the_launcher(found):
    assert found(VARIABLES) == Seat("10.0.0.2", 8476, 4, 3, None)
    assert found(VARIABLES, process=1, coordinator="h:1") == Seat("h", 1, 4, 1, None)
    assert found({**SLURM, **VARIABLES}) == Seat("10.0.0.2", 8476, 4, 3, None)
    assert found({}, coordinator="[::1]:80", processes=2, process=0).host == "::1"


def test_launchers_that_jax_knows(found):
    assert found(SLURM) == Seat("node017", 61440, 8, 5, "slurm")
    assert found({**SLURM, "JAX_COORDINATOR_PORT": "7000"}).coordinator == "node017:7000"
    assert found(SLURM, coordinator="other:1") == Seat("other", 1, 8, 5, "slurm")
    seat = found(OPEN_MPI)
    assert (seat.host, seat.processes, seat.process, seat.launcher) == ("10.96.0.1", 2, 1, "ompi")


@pytest.mark.parametrize("environment, flags, message", [
    ({}, {"coordinator": "h:1"}, "--coordinator is given and --processes is not"),
    ({}, {"processes": 2}, "--processes is given and --coordinator is not"),
    ({"JAX_PROCESS_ID": "1"}, {}, "--process is given and --coordinator is not"),
    ({}, {"coordinator": "h", "processes": 2, "process": 0}, "--coordinator=h is no HOST:PORT"),
    ({}, {"coordinator": "h:1", "processes": 2, "process": 2}, "are numbered from 0 to 1"),
    ({**VARIABLES, "JAX_PROCESS_ID": "one"}, {}, "JAX_PROCESS_ID='one' is no number"),
    ({**SLURM, "SLURM_NTASKS": "8", "SLURM_PROCID": "x"}, {}, "slurm does not say where"),
])  # fmt: skip
def test_a_place_that_does_not_fit_is_one_line(found, environment, flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        found(environment, **flags)


# --- among the others -----------------------------------------------------------------------------


def test_a_process_that_is_alone_agrees_with_itself_and_nothing_keeps_it():
    check_equal({"the hash of the data": "not even hexadecimal"})
    assert ask_all(True) == [True] and ask_all(False) == [False]
    assert leave(2) == 2
