"""The offline source: packed rows of fixed corpora, mixed by the weights of the phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llm_jax import sharding
from llm_jax.data.mixture import batches, epochs, prefetch
from llm_jax.data.packing import Rows
from llm_jax.data.phases import Phase
from llm_jax.placement import own_rows, rows_to_devices
from llm_jax.types import Batch


class OfflineSource:
    """Batches as a function of (phase, step). Its only state is how often each component has been
    read, for the log."""

    def __init__(
        self,
        phases: Sequence[Phase],
        rows: Callable[[Phase], Mapping[str, Rows]],
        seed: int,
        mesh: Mesh,
    ):
        """`rows(phase)` gives the components of a phase's mixture by name.

        Raises:
          UserError: a phase whose mixture does not fit the components; no phase has begun yet.
        """
        self._sharding = sharding.batch_sharding(mesh)
        self._datasets, self._own, self._epochs_per_step = [], [], []
        for phase in phases:
            components = rows(phase)
            # Rows of another length are other rows, so every phase has an order of its own.
            phase_seed = np.random.SeedSequence([seed, phase.index]).generate_state(1)[0]
            own = own_rows(self._sharding, phase.batch)
            self._own.append(own)
            self._datasets.append(
                batches(
                    components,
                    phase.weights,
                    phase.batch,
                    int(phase_seed),
                    places=own.places.tolist(),
                )
            )
            self._epochs_per_step.append(epochs(components, phase.weights, phase.batch, step=1))
        self._epochs: dict[str, float] = {}
        self._iterator: Iterator[Batch] | None = None
        self._phase, self._first_step, self._next_step = 0, 0, 0

    def start(self, phase: Phase, first_step: int) -> None:
        """Turns to `phase`, whose step 0 is the global step `first_step`."""
        self._phase, self._first_step, self._next_step = phase.index, first_step, first_step
        self._iterator = None

    def next(self, params: Any, step: int) -> Batch:
        """The batch of the global step `step`; `params` plays no part."""
        del params
        if self._iterator is None or step != self._next_step:
            self._iterator = prefetch(self._datasets[self._phase], step - self._first_step)
        self._next_step = step + 1
        for name, share in self._epochs_per_step[self._phase].items():
            self._epochs[name] = self._epochs.get(name, 0.0) + share
        return rows_to_devices(next(self._iterator), self._own[self._phase], self._sharding)

    def progress(self, step: int) -> dict[str, float]:
        """`epoch` of a single component, or `epoch/NAME` of each: how often it has been read."""
        ahead = self._next_step - step
        now = {
            name: value - ahead * self._epochs_per_step[self._phase].get(name, 0.0)
            for name, value in self._epochs.items()
        }
        if len(now) == 1:
            return {"epoch": next(iter(now.values()))}
        return {f"epoch/{name}": value for name, value in now.items()}

    def state(self) -> dict[str, Any]:
        # A copy: a checkpoint writes it in the background while the next batches are counted.
        return {"epochs": dict(self._epochs)}

    def restore(self, state: dict[str, Any]) -> None:
        self._epochs = dict(state["epochs"])
