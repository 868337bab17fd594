"""SIGTERM and Ctrl-C, as requests that all processes of a run grant at the same step."""

from __future__ import annotations

import collections
import signal
import threading
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Signals:
    """Remembers a signal for the loop; a second one acts at once, as without us.

    Where there are several processes, each of them says at every step what it has received, as a
    number on its devices, of which the devices of all make the largest. They read it a step later,
    when it is there, so nobody waits, and all of them know of a signal at the same step.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._agreed: int | None = None
        self._previous: dict[int, Any] = {}
        self._answers: collections.deque[jax.Array] = collections.deque()
        if jax.process_count() > 1:
            mesh = Mesh(np.array(jax.devices()), "device")
            self._devices = NamedSharding(mesh, PartitionSpec("device"))
            self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    @property
    def agreed(self) -> int | None:
        """The number of a signal that ends the run; None = none does, as yet."""
        return self._received if jax.process_count() == 1 else self._agreed

    def exchange(self, step: Any) -> None:
        """After every step, in all processes: tells the others what this one has received, and
        hears what all had at the step before.

        `step` is what the step returned. Accelerators run programs in their order, but CPUs may run
        those that do not need each other side by side, and of two collectives that meet there each
        may take the other's messages; so there each program waits for the one before.
        """
        if jax.process_count() == 1:
            return
        in_order = jax.default_backend() != "cpu"
        if not in_order:
            jax.block_until_ready(step)
        number = np.full(jax.local_device_count(), self._received or 0, np.int32)
        everyones = jax.make_array_from_process_local_data(self._devices, number)
        answer = self._largest(everyones)
        self._answers.append(answer if in_order else answer.block_until_ready())
        if len(self._answers) > 1:
            self._agreed = self._agreed or int(self._answers.popleft()) or None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: Any) -> None:
        self._reset()

    def _remember(self, number: int, _: FrameType | None) -> None:
        self._received = number
        self._reset()

    def _reset(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())
