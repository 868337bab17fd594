"""The worker of `tools.bench loop` and `trace`: whole runs, with data, log and checkpoints.

The runs go through `llm_jax.run` as on the command line. What is measured is their steady state, so
they have one phase, and neither evaluations nor samples on the way.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.sharding import Mesh

from llm_jax import run
from llm_jax.config import defaults
from llm_jax.errors import UserError
from llm_jax.trainers import TRAINERS, Stage
from llm_jax.trainers.base import ProfileConfig, Source, Trainer
from llm_jax.trainers.pretrain import PretrainConfig
from tools.bench.bare_step import BareStep
from tools.bench.jax_worker import read_config
from tools.bench.protocol import Note, serve

NEVER = 10**9  # steps
BATCHES = 16


class _SeenEnough(Exception):
    """Ends a run from inside of it."""


class _Watched:
    """A source that calls `before(params, step)` ahead of every batch; otherwise as it was."""

    def __init__(self, source: Source, before: Callable[[Any, int], None]):
        self._source, self._before = source, before
        self.batches: list[Any] = []  # the first few, kept
        self.start, self.progress = source.start, source.progress
        self.state, self.restore = source.state, source.restore

    def next(self, params: Any, step: int) -> Any:
        self._before(params, step)
        batch = self._source.next(params, step)
        if len(self.batches) < BATCHES:
            self.batches.append(batch)
        return batch


# --- loop -----------------------------------------------------------------------------------------


class _Turns:
    """Makes the loop and the bare step take turns of one checkpoint interval, in one process.

    The loop is held where it asks for a batch, with no step in flight. Turns begin in the middle
    between two checkpoints, so that a checkpoint is written in the background of the turn which
    began it. The first interval and a half of the loop are a warm-up.
    """

    def __init__(
        self, config: PretrainConfig, mesh: Mesh, trainer: Trainer, rounds: int, note: Note
    ):
        self.interval, self._rounds, self._note = config.checkpoint.every, rounds, note
        self.source = _Watched(trainer.source, self._before_batch)
        phase = trainer.phases[0]
        self.tokens = self.interval * phase.tokens_per_step
        self.loop_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self._begin: float | None = None
        self._next_turn = self.interval + self.interval // 2
        self._bare = BareStep(
            config,
            mesh,
            trainer.init_params,
            trainer.setting(phase).objective,
            phase.batch,
            phase.length,
        )

    def _before_batch(self, params: Any, step: int) -> None:
        if step != self._next_turn:
            return
        jax.block_until_ready(params)
        if self._begin is None:
            self._warm_up()
        else:
            self.loop_seconds.append(time.perf_counter() - self._begin)
            self.bare_seconds.append(sum(self._bare.run(self.interval)))
            self._note(f"round {len(self.loop_seconds)} of {self._rounds}")
        if len(self.loop_seconds) == self._rounds:
            raise _SeenEnough
        self._next_turn += self.interval
        self._begin = time.perf_counter()

    def _warm_up(self) -> None:
        self._note("warming up")
        self._bare.compile(self.source.batches[0])
        self._bare.start(self.source.batches)
        self._bare.run(min(self.interval, BATCHES))


def overhead(
    note: Note, config: str, overrides: list[str], phase: int, rounds: int, workdir: str
) -> dict[str, Any]:
    """Seconds of every turn of the loop and of the bare step, with what was on meanwhile."""
    settings = read_config(config, overrides)
    if settings.checkpoint.every < 1:
        raise UserError(f"config.checkpoint.every={settings.checkpoint.every}: give at least 1.")
    settings = _steady(settings, phase, (rounds + 2) * settings.checkpoint.every)
    turns: list[_Turns] = []

    def watch(trainer: Trainer, mesh: Mesh) -> _Watched:
        turns.append(_Turns(settings, mesh, trainer, rounds, note))
        return turns[0].source

    note("preparing the run")
    _run_watched(settings, workdir, watch)
    return {
        "loop_seconds": turns[0].loop_seconds,
        "bare_seconds": turns[0].bare_seconds,
        "steps": turns[0].interval,
        "tokens": turns[0].tokens,
        "log_every": settings.metrics.every,
        "batch": settings.phases[0].batch,
        "length": settings.phases[0].length,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
    }


# --- trace ----------------------------------------------------------------------------------------


def trace(
    note: Note, config: str, overrides: list[str], phase: int, steps: int, workdir: str
) -> dict[str, Any]:
    """Traces `steps` steps of a run in `workdir`, with two checkpoints and log lines among them."""
    settings = read_config(config, overrides)
    # The first checkpoint, which sets things up, comes before the window, two more in its quarters.
    every = steps // 2
    start = every + every // 2
    settings = _steady(settings, phase, start + steps + 1)
    settings = dataclasses.replace(
        settings,
        checkpoint=dataclasses.replace(settings.checkpoint, every=every),
        metrics=dataclasses.replace(settings.metrics, every=min(settings.metrics.every, every)),
        profile=ProfileConfig(start=start, steps=steps),
    )
    note("running")
    run.run(_config_dict(settings), workdir)
    return {}


# --- runs -----------------------------------------------------------------------------------------


def _steady(config: PretrainConfig, phase: int, steps: int) -> PretrainConfig:
    """The config with one phase of `steps` steps, no evaluation but the last, and no sample."""
    if not 1 <= phase <= len(config.phases):
        raise UserError(f"--phase={phase}: the config has phases 1 to {len(config.phases)}.")
    warmup = min(config.optimizer.warmup_steps, steps)
    only = dataclasses.replace(
        config.phases[phase - 1], steps=steps, tokens=None, gate=None, rewarm_steps=0
    )
    return dataclasses.replace(
        config,
        phases=(only,),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=warmup),
        evaluation=dataclasses.replace(config.evaluation, every=NEVER),
        sample=dataclasses.replace(config.sample, max_new_tokens=0),
    )


def _config_dict(config: PretrainConfig) -> Any:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return defaults(PretrainConfig, **values)


def _run_watched(
    config: PretrainConfig, workdir: str, watch: Callable[[Trainer, Mesh], _Watched]
) -> None:
    """Runs until the watcher has seen enough; its source stands in for the trainer's."""
    stage = TRAINERS["pretrain"]

    def build(run_config: Any, mesh: Mesh, folder: Path, log: Callable[[str], None]) -> Trainer:
        trainer = stage.build(run_config, mesh, folder, log)
        return dataclasses.replace(trainer, source=watch(trainer, mesh))

    watched = {"pretrain": Stage(stage.config, build)}
    with mock.patch.dict(TRAINERS, watched):
        try:
            run.run(_config_dict(config), workdir)
        except _SeenEnough:
            return
    raise UserError("the run was stopped before enough had been measured.")


def main() -> None:
    serve({"overhead": overhead, "trace": trace})
