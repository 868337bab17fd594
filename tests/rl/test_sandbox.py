"""What code that a model wrote can do, and what it cannot."""

import os
import socket
import subprocess
import sys
import time

import pytest

from llm_jax.rl import sandbox
from llm_jax.rl.sandbox import Limits

LIMITS = Limits(seconds=20.0)
BRIEF = Limits(seconds=2.5)

isolated = pytest.mark.skipif(not sandbox.isolation(), reason="this system gives no namespaces")


def run(code, tests=("assert right",), limits=LIMITS):
    return sandbox.run(code, list(tests), limits)


def test_each_test_passes_by_itself():
    tests = ["assert f() == 1", "assert f() == 2", "undefined", "import sys; sys.exit(0)", "f()"]
    assert run("def f():\n    return 1", tests) == [True, False, False, False, True]


@pytest.mark.parametrize(
    "code",
    [
        "right = True; 1 / 0",
        "right = True; import sys; sys.exit(0)",
        "right = True; import os; os._exit(0)",
        "right = True; raise KeyboardInterrupt",
        "right = True; import ctypes; ctypes.string_at(0)",
        "right = ",
        "\0",
        "right = '\ud800'",
        "x = []\nfor _ in range(100000): x = [x]\nright = True; repr(x)",
    ],
)
def test_code_that_does_not_get_to_its_end_passes_nothing(code):
    assert run(code) == [False]


def test_what_code_prints_is_no_verdict():
    code = "import os\nfor place in range(100):\n    print('ready', place, flush=True)\n"
    assert run(code + "    os.write(1, b'0\\n')\nright = False") == [False]
    assert run("print('x' * 10_000_000); right = True") == [True]


def test_there_is_nothing_to_read():
    assert run("try:\n    input()\nexcept EOFError:\n    right = True") == [True]


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)"])
def test_code_that_hangs_is_ended(code):
    begin = time.monotonic()
    assert run(code, limits=BRIEF) == [False]
    assert time.monotonic() - begin < 10


def test_tests_before_one_that_hangs_have_passed():
    assert run("", ["pass", "while True: pass", "pass"], BRIEF) == [True, False, False]


def test_memory_and_files_are_bounded():
    assert run("x = bytearray(1 << 30); right = True") == [False]
    assert run("x = bytearray(1 << 30); right = True", limits=Limits(20.0, 3000)) == [True]
    write = "right = open('mine', 'w').write('x' * {})"
    assert run(write.format(1000)) == [True]
    assert run(write.format(2 << 20)) == [False]


@isolated
@pytest.mark.parametrize(
    "code",
    [
        "import os; os.fork()",
        "import threading; threading.Thread(target=print).start()",
    ],
)
def test_code_starts_no_process_and_no_thread(code):
    if os.geteuid() == 0 and "--user" in sandbox.isolation():
        pytest.skip("Linux bounds no processes of root's own")
    assert run(f"{code}\nright = True") == [False]


@isolated
def test_code_reaches_no_network():
    code = "import socket\ntry:\n    socket.create_connection(('127.0.0.1', {}), 1)\n"
    code += "except OSError as error:\n    right = True"
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert run(code.format(server.getsockname()[1])) == [True]


@isolated
def test_code_writes_no_file_of_others(tmp_path):
    os.chmod(tmp_path, 0o777)
    path = tmp_path / "file"
    path.write_text("kept")
    os.chmod(path, 0o666)
    for code in (f"open({str(path)!r}, 'w')", f"import os; os.remove({str(path)!r})"):
        assert run(f"{code}\nright = True") == [False]
    remount = (
        "import ctypes\nlibc = ctypes.CDLL(None)\nright = not libc.mount(b'none', b'/', None, "
    )
    assert run(remount + "32 | 4096, None)") == [False]
    assert path.read_text() == "kept"


@isolated
def test_nothing_that_was_started_goes_on(tmp_path):
    late = f"import time; time.sleep(0.5); open({str(tmp_path / 'late')!r}, 'w')"
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {late!r}], "
    command = [*sandbox.isolation(), sys.executable, "-c", start + "start_new_session=True)"]
    with open(os.devnull, "r+b") as nothing:
        sandbox._execute(command, str(tmp_path), (nothing, nothing, nothing), 20.0)
    time.sleep(1)
    assert not (tmp_path / "late").exists()


def test_secrets_of_the_environment_stay_outside(monkeypatch):
    monkeypatch.setenv("API_KEY", "secret")
    assert run("import os; right = 'API_KEY' not in os.environ and 'PATH' in os.environ") == [True]


def test_the_same_code_does_the_same():
    assert run(f"right = hash('x') == {_hash_of_x()}") == [True]


def _hash_of_x():
    command = [sys.executable, "-c", "print(hash('x'))"]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


def test_without_namespaces_the_limits_hold(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", tuple)
    assert run("right = True") == [True]
    assert run("while True: pass", limits=BRIEF) == [False]
    assert run("x = bytearray(1 << 30); right = True") == [False]


def test_a_sandbox_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: ("unshare-that-is-not-there",))
    with pytest.raises(RuntimeError, match=r"the sandbox did not start: .*not-there"):
        run("right = True")
    monkeypatch.setattr(sandbox, "isolation", lambda: ("sh", "-c", "echo no room >&2"))
    with pytest.raises(RuntimeError, match="the sandbox did not start: no room"):
        run("right = True")
    monkeypatch.setattr(sandbox, "isolation", lambda: ("sleep",))
    with pytest.raises(RuntimeError, match="the sandbox did not start"):
        run("right = True")
