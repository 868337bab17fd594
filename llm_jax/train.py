"""THE loop: restore, step, evaluate, save. There is exactly one.

The device never waits for the host: a step's metrics are read while the next step runs, checkpoints
are written in the background, and batches are made ahead of time by the source's threads.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax import optim, sharding
from llm_jax import step as step_module
from llm_jax.checkpoint import Checkpointer
from llm_jax.data.phases import Clock, Phase, judge
from llm_jax.distributed import failures, wait_for_all
from llm_jax.errors import one_line
from llm_jax.metrics import RunLog
from llm_jax.signals import Signals
from llm_jax.throughput import Throughput, peak_flops
from llm_jax.trainers.base import Evaluation, ProfileConfig, RunConfig, Setting, Trainer
from llm_jax.types import Mean, TrainState, join

FAILED = "failed"  # eval/NAME/failed is 1 where an evaluation had no other result


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. metrics: the last value of every logged key. Unmeasured values are None."""

    step: int
    tokens: int
    seconds: float
    metrics: dict[str, float]
    tokens_per_second: float | None
    mfu: float | None
    skipped_steps: int
    failed_evaluations: int
    sample: str | None
    signal: int | None


def train(trainer: Trainer, config: RunConfig, mesh: Mesh, workdir: Path, log: RunLog) -> Outcome:
    """Trains from the newest checkpoint of `workdir`, or from the start, to the last phase's end.

    SIGTERM and Ctrl-C end it after the step in flight, with a checkpoint; of several processes all
    end at the same step, whichever got the signal.
    """
    loop = _Loop(trainer, config, mesh, workdir, log)
    with Signals() as signals:
        try:
            return loop.run(signals)
        finally:
            loop.checkpointer.close()


class _Loop:
    def __init__(self, trainer: Trainer, config: RunConfig, mesh: Mesh, workdir: Path, log: RunLog):
        self.trainer, self.config, self.mesh, self.log = trainer, config, mesh, log
        self.phases = trainer.phases
        self.checkpointer = Checkpointer(workdir, config.checkpoint)
        self.profiler = _Profiler(config.profile, workdir)
        self.clock = Clock()
        self.seconds_before = 0.0
        self.started = time.monotonic()
        self.throughput = Throughput(jax.device_count())
        self.latest: dict[str, float] = {}
        self.sample: str | None = None
        self.failed_evaluations = 0
        self.train_step: Any = None
        self.state = self._restore_or_init()
        self.step = int(self.state.step)

    # --- where the state comes from ---------------------------------------------------------------

    def _restore_or_init(self) -> TrainState:
        boxed = jax.eval_shape(self.trainer.init_params, jax.random.key(0))
        param_shardings = sharding.parameter_shardings(self.mesh, boxed)
        self.optimizer = optim.make_optimizer(
            self.config.optimizer, sharding.unbox(boxed), self.trainer.width_multiplier
        )

        def init_params(rng: jax.Array) -> Any:
            return sharding.unbox(self.trainer.init_params(rng))

        abstract, self.shardings = step_module.init_state(
            init_params, self.optimizer, self.config.seed, self.mesh, param_shardings
        )
        # 1. the run's own newest checkpoint
        restored = self.checkpointer.restore(
            abstract,
            averaged=optim.ema_params(abstract.opt_state) is not None,
            warn=self.log.message,
        )
        if restored is not None:
            state, cursor = restored
            self.clock = Clock(**cursor["clock"])
            self.trainer.source.restore(cursor["source"])
            self.seconds_before = cursor["seconds"]
            self.failed_evaluations = cursor["failed_evaluations"]
            self.latest = cursor["metrics"]
            self.log.resume(int(state.step), cursor["sums"])
            self.log.message(f"resumed at step {int(state.step)}")
            return self._with_frozen(state)
        self.log.resume(0)
        # 2. the parameters of an earlier stage
        if self.trainer.load_params is not None:
            params = self.trainer.load_params(abstract.params)
            return self._with_frozen(
                step_module.begin(params, self.optimizer, self.config.seed, self.shardings)
            )
        # 3. scratch
        return self._with_frozen(
            step_module.materialise(init_params, self.optimizer, self.config.seed, self.shardings)
        )

    def _with_frozen(self, state: TrainState) -> TrainState:
        frozen = self.trainer.frozen
        where = jax.tree.map(lambda x: x.sharding, frozen)
        self.shardings = dataclasses.replace(self.shardings, frozen=where)
        return dataclasses.replace(state, frozen=frozen)

    # --- the phases -------------------------------------------------------------------------------

    def run(self, signals: Signals) -> Outcome:
        """Runs phase after phase; each compiles once, however often its gate holds."""
        while not self._run_phase(self.phases[self.clock.index], signals):
            pass
        self.checkpointer.wait()
        speed = self.throughput.average()
        return Outcome(
            step=self.step,
            tokens=self.clock.tokens(self.phases, self.step),
            seconds=self._seconds(),
            metrics=self.latest,
            tokens_per_second=speed,
            mfu=self.throughput.average_mfu(),
            skipped_steps=int(optim.read_metrics(self.state.opt_state)["skipped_steps"]),
            failed_evaluations=self.failed_evaluations,
            sample=self.sample,
            signal=signals.agreed,
        )

    def _run_phase(self, phase: Phase, signals: Signals) -> bool:
        """Trains one phase until its gate opens. Returns whether the run is over."""
        setting = self.trainer.setting(phase)
        self.train_step = None
        while True:
            self._train_phase(phase, setting, signals)
            if signals.agreed is not None:
                self._save(setting)
                return True
            if self._close_phase(phase, setting):
                return phase.index == len(self.phases) - 1
            self.throughput.resume()

    def _train_phase(self, phase: Phase, setting: Setting, signals: Signals) -> None:
        """Steps until the phase's end, as far as it is known now, or until a signal."""
        end = self.clock.phase_end(self.phases)
        if self.step >= end:
            return
        if self.step == 0 and self.config.evaluation.at_start:
            self._evaluate(setting)
        self.trainer.source.start(phase, self.clock.start)
        self.log.start_phase(phase.index, phase.length, self.clock.last_step(self.phases))
        waiting: collections.deque[tuple[int, Any]] = collections.deque()
        while self.step < end and signals.agreed is None:
            self.profiler.before_step(self.step)
            whole = join(self.state.params, self.state.frozen)
            batch = self.trainer.source.next(whole, self.step)
            if self.train_step is None:
                self.train_step = self._compile(phase, setting, batch)
                self.throughput.start(setting.flops_per_token, peak_flops(jax.devices()[0]))
            rate = phase.learning_rate(self.step - self.clock.start)
            self.state, metrics = self.train_step(self.state, batch, rate)
            self.step += 1
            waiting.append((self.step, {**metrics, "learning_rate": rate}))
            signals.exchange(metrics)
            if len(waiting) > 1:
                self._read(phase, *waiting.popleft())
            if self._is_due(self.config.evaluation.every, self.config.checkpoint.every):
                self._drain(phase, waiting)
                self._pause_for_evaluation_and_checkpoint(setting)
        self._drain(phase, waiting)
        self.profiler.stop()

    def _close_phase(self, phase: Phase, setting: Setting) -> bool:
        """Evaluates, asks the gate, saves. Returns whether the phase is over."""
        self.throughput.pause()
        metrics = self._evaluate(setting)
        opened = self._ask_gate(phase, metrics)
        if opened and phase.index < len(self.phases) - 1:
            self.clock.advance(self.phases, self.step)
        self._save(setting)
        return opened

    def _ask_gate(self, phase: Phase, metrics: dict[str, float]) -> bool:
        if phase.gate is None:
            return True
        verdict = judge(phase.gate, self.clock, metrics)
        self.log.write(self.step, {"gate/open": float(verdict.opened)})
        where = f"gate of phase {phase.index + 1} at length {phase.length}"
        if not verdict.opened:
            self.clock.hold(phase.gate)
            until = self.clock.phase_end(self.phases)
            self.log.message(f"{where} holds until step {until}: {verdict.reason}")
            return False
        how = "is forced open (its extra steps are used up)" if verdict.forced else "opens"
        self.log.message(f"{where} {how}: {verdict.reason}")
        known = [self.clock.best_short_loss, metrics.get("eval/short/loss")]
        self.clock.best_short_loss = min((loss for loss in known if loss is not None), default=None)
        return True

    # --- one phase's parts ------------------------------------------------------------------------

    def _compile(self, phase: Phase, setting: Setting, batch: Any) -> Any:
        """Compiles the step ahead of its first call, so that its time stands apart in the log."""
        micro_batches = setting.micro_batches
        train_step = step_module.make_train_step(
            setting.objective,
            self.optimizer,
            mesh=self.mesh,
            shardings=self.shardings,
            micro_batches=micro_batches,
            parameter_dtype=self.config.step.parameter_dtype,
        )
        begin = time.monotonic()
        compiled = train_step.lower(self.state, batch, np.float32(0)).compile()
        wait_for_all("the step is compiled")
        facts = [*setting.facts, f"compiled in {time.monotonic() - begin:.1f} s"]
        number = f"phase {phase.index + 1} of {len(self.phases)}"
        shape = f"length {phase.length}, batch {phase.batch} in {micro_batches} micro-batches"
        self.log.message(f"{number}: {shape}; {'; '.join(facts)}")
        return compiled

    def _read(self, phase: Phase, step: int, device_metrics: dict[str, Any]) -> None:
        """Takes one step's metrics, which are ready or nearly so, and logs at the cadence."""
        metrics = jax.device_get(device_metrics)
        self.throughput.tick(phase.tokens_per_step)
        self.log.accumulate({k: v for k, v in metrics.items() if isinstance(v, Mean)})
        if step % self.config.metrics.every == 0 or step == self.clock.phase_end(self.phases):
            scalars = {k: float(v) for k, v in metrics.items() if not isinstance(v, Mean)}
            scalars |= {
                "tokens": self.clock.tokens(self.phases, step),
                "phase": phase.index + 1,
                "length": phase.length,
                **self.trainer.source.progress(step),
                **self.throughput.read(),
            }
            self.latest |= self.log.write_step(step, scalars)

    def _drain(self, phase: Phase, waiting: collections.deque[tuple[int, Any]]) -> None:
        while waiting:
            self._read(phase, *waiting.popleft())

    def _is_due(self, *intervals: int) -> bool:
        return any(self.step % every == 0 for every in intervals)

    def _pause_for_evaluation_and_checkpoint(self, setting: Setting) -> None:
        if self.step == self.clock.phase_end(self.phases):
            return  # the end of a phase evaluates and saves, after the gate has spoken
        self.throughput.pause()
        if self._is_due(self.config.evaluation.every):
            self._evaluate(setting)
        if self._is_due(self.config.checkpoint.every):
            self._save(setting)
        self.throughput.resume()

    def _evaluate(self, setting: Setting) -> dict[str, float]:
        """Runs the phase's evaluations on the product and records what they return."""
        params = self._product()
        results: dict[str, float] = {}
        for evaluation in setting.evaluations:
            values = self._run_evaluation(evaluation, params)
            results |= {f"eval/{evaluation.name}/{key}": value for key, value in values.items()}
        self.log.write(self.step, results)
        past = [f"eval/{evaluation.name}/{FAILED}" for evaluation in setting.evaluations]
        self.latest = {key: x for key, x in self.latest.items() if key not in past} | results
        return results

    def _run_evaluation(self, evaluation: Evaluation, params: Any) -> dict[str, float]:
        """What it returns; a failure is told, counted and recorded, and training goes on."""
        values, failure = {}, None
        try:
            values = evaluation.run(params)
        except Exception as error:
            failure = one_line(error)
        failed = failures(f"evaluation {evaluation.name}", failure)
        if not failed:
            return values
        process, reason = next(iter(failed.items()))
        where = f" in process {process}" if jax.process_count() > 1 else ""
        self.log.message(f"evaluation {evaluation.name} failed{where}: {reason}")
        self.failed_evaluations += 1
        return {FAILED: 1.0}

    def _save(self, setting: Setting) -> None:
        if setting.sample is not None:
            self.sample = setting.sample(self._product())
            self.log.sample(self.step, self.sample)
        cursor = {
            "clock": dataclasses.asdict(self.clock),
            "source": self.trainer.source.state(),
            "seconds": self._seconds(),
            "failed_evaluations": self.failed_evaluations,
            "metrics": self.latest,
            "sums": self.log.sums(),
        }
        self.checkpointer.save(self.step, self.state, self._trained(), cursor, setting.meta)

    def _trained(self) -> Any:
        """The trained parameters that later stages use: the average where one is kept."""
        average = optim.ema_params(self.state.opt_state)
        return self.state.params if average is None else average

    def _product(self) -> Any:
        """All parameters, as evaluations see them."""
        return join(self._trained(), self.state.frozen)

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started


class _Profiler:
    """Traces the configured window of steps into RUN/profile."""

    def __init__(self, config: ProfileConfig, workdir: Path):
        self._config, self._folder, self._running = config, workdir / "profile", False

    def before_step(self, step: int) -> None:
        if not self._config.steps:
            return
        if step == self._config.start:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step == self._config.start + self._config.steps:
            self.stop()

    def stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
