"""The meeting of processes, as threads that talk over loopback."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llm_jax.errors import UserError
from llm_jax.meeting import Seat, describe, difference, meet


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def gather(*seats, timeout=20.0):
    """What each process of (process, processes, description) ends its meeting with."""
    port = free_port()

    def one(seat):
        process, processes, description = seat
        try:
            meet(Seat("127.0.0.1", port, processes, process, None), description, timeout)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(seats)) as pool:
        return list(pool.map(one, seats))


SAME = {"config.seed": "0", "the version of jax": "0.10.2"}


def test_processes_that_run_the_same_go_on():
    assert gather(*[(i, 5, SAME) for i in range(5)]) == [None] * 5


def test_all_processes_say_what_differs_and_where():
    other = {**SAME, "config.seed": "1", "config.new": "2"}
    lines = gather((0, 3, SAME), (1, 3, SAME), (2, 3, other))
    assert lines == [lines[0]] * 3
    assert lines[0].startswith(
        "process 2 (127.0.0.1) differs: config.seed is 1 there and 0 on process 0, and 1 more; "
    ) or lines[0].startswith("process 2 (::ffff:127.0.0.1) differs: config.seed is 1 there")


def test_a_number_that_two_have_is_refused():
    lines = gather((0, 3, SAME), (1, 3, SAME), (1, 3, SAME))
    assert lines == [lines[0]] * 3 and "both are process 1" in lines[0]


def test_processes_that_count_differently_are_refused():
    lines = gather((0, 2, SAME), (1, 3, SAME))
    assert lines == [lines[0]] * 2
    assert "is one of 3 and process 0 one of 2" in lines[0]


def test_a_process_that_does_not_come_is_named_to_those_who_did():
    began = time.monotonic()
    lines = gather((0, 4, SAME), (2, 4, SAME), timeout=1.0)
    assert time.monotonic() - began < 10
    assert lines == [lines[0]] * 2
    assert "2 of 4 processes came" in lines[0] and "within 1 s; missing: 1, 3." in lines[0]


def test_a_coordinator_that_is_not_there_is_named():
    (line,) = gather((1, 2, SAME), timeout=0.5)
    assert line.startswith("process 1 of 2 waited 0.5 s for process 0 at 127.0.0.1:")


def test_a_process_that_was_started_again_takes_its_place_and_strangers_none():
    port = free_port()
    seats = [Seat("127.0.0.1", port, 3, process, None) for process in range(3)]
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(meet, seats[0], SAME, 20.0)

        def call(text):
            while True:
                try:
                    connection = socket.create_connection(("127.0.0.1", port))
                except OSError:
                    time.sleep(0.01)
                    continue
                connection.sendall(text)
                return connection

        call(b"GET / HTTP/1.1\r\n\r\n").close()
        call(b"").close()
        with call(b'{"process": 1, "processes": 3, "description": {}}\n'):
            time.sleep(0.2)  # process 0 has heard it; then it is killed
        others = [pool.submit(meet, seat, SAME, 20.0) for seat in seats[1:]]
        assert [future.result() for future in (first, *others)] == [None] * 3


def test_a_port_that_another_run_has_is_named():
    with socket.create_server(("", 0), reuse_port=False) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at port {port}"):
            meet(Seat("127.0.0.1", port, 2, 0, None), SAME, 1.0)


def test_what_answers_in_other_words_is_no_process_0():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        seat = Seat("127.0.0.1", server.getsockname()[1], 2, 1, None)
        with pytest.raises(UserError, match="is not, or no longer, process 0 of this run"):
            meet(seat, SAME, 5.0)
        thread.join()


# --- what is compared -----------------------------------------------------------------------------


def test_the_description_holds_config_code_and_versions():
    description = describe({"model": {"embed_dim": 4}, "phases": [{"length": 8}]}, "runs/x")
    assert description["config.model.embed_dim"] == "4"
    assert description["config.phases[0].length"] == "8"
    assert description["--workdir"] == "runs/x"
    assert len(description["the hash of llm_jax/distributed.py"]) == 12
    assert {"the version of jax", "the version of python"} <= description.keys()
    assert not any("__pycache__" in name for name in description)


def test_the_difference_names_the_first_key():
    assert difference(SAME, dict(SAME)) is None
    assert difference({"a": "1"}, {}) == "a is absent there and 1 on process 0"
