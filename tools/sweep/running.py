"""Runs points as processes of their own, some at once."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

from tools.sweep.outcome import (
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    WAITING,
    Outcome,
    latest_step,
    read_outcome,
)
from tools.sweep.points import Point

LOGS = "logs"
POLL_SECONDS = 0.2


class Watcher(Protocol):
    """Told of each point when it has to wait for another's process, starts, and has ended."""

    def held(self, outcome: Outcome) -> None: ...
    def started(self, outcome: Outcome) -> None: ...
    def ended(self, outcome: Outcome) -> None: ...


@dataclasses.dataclass
class _Process:
    outcome: Outcome
    process: subprocess.Popen
    begin: float
    seconds_before: float


def run_points(
    outcomes: Sequence[Outcome], workdir: Path, parallel: int, watcher: Watcher
) -> int | None:
    """Runs what is not finished, `parallel` points at once, and keeps `outcomes` up to date.

    Each is `python -m llm_jax.main` in a folder of its own, with a log in WORKDIR/logs. One that
    fails leaves the others alone. SIGINT and SIGTERM end all of them by SIGTERM, upon which they
    write their checkpoints; a second signal kills them. Where this process is killed itself, Linux
    sends them SIGTERM, too, and what is started anew waits until they have ended.

    Returns:
      The number of the signal that ended the sweep; None where all points have had their turn.
    """
    (workdir / LOGS).mkdir(parents=True, exist_ok=True)
    waiting = [outcome for outcome in outcomes if outcome.status != FINISHED]
    going: list[_Process] = []
    with _signals() as received:
        sent = 0
        try:
            while going or (waiting and not received):
                if not received:
                    _start(waiting, going, workdir, parallel, watcher)
                elif sent < len(received):
                    for each in going:
                        each.process.send_signal(_kind(sent))
                    sent += 1
                time.sleep(POLL_SECONDS)
                going = [each for each in going if not _ended(each, workdir, watcher)]
        finally:  # an error of our own
            for each in going:
                each.process.terminate()
    return received[0] if received else None


def log_path(workdir: Path, name: str) -> Path:
    return workdir / LOGS / f"{name}.log"


def command(point: Point, workdir: Path) -> list[str]:
    """What is run for a point."""
    folder = f"--workdir={workdir / point.name}"
    return [sys.executable, "-m", "llm_jax.main", *point.flags, folder]


def _kind(sent: int) -> signal.Signals:
    return signal.SIGTERM if sent == 0 else signal.SIGKILL


def _start(
    waiting: list[Outcome], going: list[_Process], workdir: Path, parallel: int, watcher: Watcher
) -> None:
    for outcome in list(waiting):
        if len(going) >= parallel:
            return
        with open(log_path(workdir, outcome.point.name), "ab") as log:
            # The lock is the process's for as long as it writes there, even when we are gone.
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not outcome.reason:
                    outcome.reason = "another process is at it"
                    watcher.held(outcome)
                continue
            waiting.remove(outcome)
            # What another process has done in the meantime.
            now = read_outcome(outcome.point, workdir)
            process = subprocess.Popen(
                command(outcome.point, workdir),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        outcome.status, outcome.reason = RUNNING, ""
        going.append(_Process(outcome, process, time.monotonic(), now.seconds))
        watcher.started(outcome)


def _end_with_parent() -> None:
    """In a new process: asks Linux for SIGTERM as soon as the parent is gone."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _ended(each: _Process, workdir: Path, watcher: Watcher) -> bool:
    """Brings the outcome up to date; whether the process has ended."""
    outcome, status = each.outcome, each.process.poll()
    if status is None:
        outcome.step = latest_step(outcome.point, workdir)
        outcome.seconds = each.seconds_before + time.monotonic() - each.begin
        return False
    found = read_outcome(outcome.point, workdir)
    outcome.step, outcome.metrics = found.step, found.metrics
    outcome.seconds = found.seconds or outcome.seconds
    if status == 0 and found.status == FINISHED:
        outcome.status = FINISHED
    elif status in (128 + signal.SIGTERM, -signal.SIGTERM, 128 + signal.SIGINT):
        outcome.status = STOPPED if found.step is not None else WAITING
    else:
        outcome.status, outcome.reason = FAILED, _reason(workdir, outcome.point.name, status)
    watcher.ended(outcome)
    return True


def _reason(workdir: Path, name: str, status: int) -> str:
    """The last line of the log, which of bad input says what is wrong."""
    lines = log_path(workdir, name).read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{how}: {said}"


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The numbers of the signals received so far, in place of what they would do."""
    received: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
