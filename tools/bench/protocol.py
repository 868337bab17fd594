"""Worker processes that answer questions line by line; needs nothing but the standard library.

A question is one JSON line on the worker's stdin, `{"call": NAME, ...arguments}`. The answer is
one JSON line on its stdout: an object, or `{"error": TEXT}` for bad input. Lines `{"note": TEXT}`
before it tell how far the work is. What the worker prints otherwise goes to its stderr, which is
kept for the last words of one that dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

Note = Callable[[str], None]


class WorkerError(Exception):
    """A worker refused a question or died; the message is one line."""


class Worker:
    """The asking side of a process that serves the functions of a module. A context manager.

    Args:
      module: a module whose `main()` calls `serve`.
      python: the interpreter.
      environment: variables on top of this process's.
    """

    def __init__(
        self,
        module: str,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ):
        # The root goes last on the path: another interpreter keeps its own packages.
        code = f"import sys; sys.path.append({str(ROOT)!r}); import {module} as m; m.main()"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        try:
            self._process = subprocess.Popen(
                [python, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env={**os.environ, **(environment or {})},
            )
        except OSError as error:
            self._errors.close()
            raise WorkerError(f"{python} does not start: {error.strerror}") from error

    def ask(self, call: str, note: Note | None = None, **arguments: Any) -> dict[str, Any]:
        """Calls the worker's function and waits for its answer.

        Raises:
          WorkerError: the worker calls the question bad, or has died.
        """
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # it has died: the missing answer tells why
            print(json.dumps({"call": call, **arguments}), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise WorkerError(answer["error"])
            if "note" not in answer:
                return answer
            if note is not None:
                note(answer["note"])
        raise WorkerError(self._last_words())

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return f"a worker ended with status {status}: {lines[-1] if lines else 'no message'}"


def serve(functions: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers questions until stdin ends.

    Every function takes `note`, to tell how far it is, and the arguments of the question. An
    exception of type `UserError`, by name, is an answer; any other ends the process.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # prints of libraries must not stand between the answers

    def say(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=channel, flush=True)

    for line in sys.stdin:
        question = json.loads(line)
        function = functions[question.pop("call")]
        try:
            say(function(note=lambda text: say({"note": text}), **question))
        except Exception as error:
            if type(error).__name__ != "UserError":
                raise
            say({"error": str(error)})


# --- memory of this process -----------------------------------------------------------------------


def resident_bytes() -> int:
    """Physical memory that this process holds now; its peak where the system tells no more."""
    return _status("VmRSS") or _peak_by_getrusage()


def peak_resident_bytes() -> int:
    """The most physical memory that this process held since `reset_peak`."""
    return _status("VmHWM") or _peak_by_getrusage()


def reset_peak() -> None:
    """Starts the peak anew, where the system can: tracing and compiling leave a peak behind."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(found[0]) * 1024 if found else None


def _peak_by_getrusage() -> int:
    import resource  # exists on Unix only, and so does every backend that is measured here

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
