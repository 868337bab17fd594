"""Measures the bare jitted train step on random tokens.

    python -m tools.bench train [--config=FILE --config.KEY=VALUE ...] [--rounds=5 --steps=10]
    python -m tools.bench train --a='model.dtype=float32' --b='model.dtype=bfloat16'
    python -m tools.bench train --b='env.MALLOC_TOP_PAD_=268435456'
    python -m tools.bench train --torch=/path/to/python --torch_args='--compile --dtype=bfloat16'

A setting is a list KEY=VALUE,KEY=VALUE of config overrides; env.NAME=VALUE sets an environment
variable; without --a the config stands as it is. With --torch the reference of torch_llama.py is
the first side, of the same shape, batch and dtype, in an interpreter with torch and transformers.
Every side lives in a process of its own. They take turns of a few steps, one at a time, because
other work on the machine comes and goes. Ratios are of tokens/s, each side against the first, round
by round.

MFU = tokens/s × FLOPs a token / peak, where the peak is the best square matrix product of the
setting's dtype measured between the rounds. Compile seconds include tracing: cold with an empty
compilation cache, warm by a new process with the cache that the cold one left.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from llm_jax.errors import UserError
from tools.bench.protocol import Worker, WorkerError
from tools.bench.summary import spread, tell, write_json
from tools.bench.train_report import report

DEFAULT_CONFIG = Path(__file__).with_name("default_config.py")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one side changes: config overrides as flags, and environment variables."""

    text: str
    overrides: list[str]
    environment: dict[str, str]

    @staticmethod
    def parse(text: str) -> Setting:
        """Reads KEY=VALUE,KEY=VALUE; a comma inside a value is kept unless KEY= follows it."""
        overrides, environment = [], {}
        for part in re.split(r",(?=[A-Za-z_][\w.\[\]]*=)", text) if text else []:
            key, equals, value = part.partition("=")
            if not equals:
                raise UserError(f"setting {part!r} is not understood: give KEY=VALUE.")
            if key.startswith("env."):
                environment[key.removeprefix("env.")] = value
            else:
                overrides.append(f"--config.{key.removeprefix('config.')}={value}")
        return Setting(text, overrides, environment)


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string(
        "config",
        str(DEFAULT_CONFIG),
        "pre-training config; its batch, model, loss, optimizer, mesh and step are used",
        flag_values=values,
    )
    flags.DEFINE_integer("phase", 1, "which phase of the config, from 1", flag_values=values)
    flags.DEFINE_string("a", None, "the first setting", flag_values=values)
    flags.DEFINE_string("b", None, "the second setting", flag_values=values)
    flags.DEFINE_string("torch", None, "an interpreter with torch", flag_values=values)
    flags.DEFINE_string("torch_args", "", "more flags of torch_llama.py", flag_values=values)
    flags.DEFINE_integer("rounds", 5, "turns of each side", flag_values=values)
    flags.DEFINE_integer("steps", 10, "measured steps a turn", flag_values=values)
    flags.DEFINE_string("output", None, "also write everything as JSON", flag_values=values)
    return values


def main(values: flags.FlagValues, overrides: list[str]) -> None:
    if values.rounds < 1 or values.steps < 1:
        raise UserError("--rounds and --steps must be at least 1.")
    if values.torch_args and not values.torch:
        raise UserError("--torch_args needs --torch, an interpreter with torch and transformers.")
    settings = [Setting.parse(values.a or "")]
    if values.b is not None:
        settings.append(Setting.parse(values.b))
    with write_json(values.output) as write:
        try:
            result = _measure(values, overrides, settings)
        except WorkerError as error:
            raise UserError(str(error)) from error
        report(result)
        write(result)


def _measure(
    values: flags.FlagValues, overrides: list[str], settings: list[Setting]
) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        sides: list[_Side] = [
            _JaxSide(name, setting, values.config, overrides, values.phase, stack)
            for name, setting in zip("AB", settings, strict=False)
        ]
        for side in sides:
            tell(f"compiling {side.name}")
            side.prepare()
        if values.torch:
            arguments = torch_arguments(sides[0].facts) + shlex.split(values.torch_args)
            sides.insert(0, _TorchSide(values.torch, arguments, stack))
            tell("starting torch")
            sides[0].prepare()
        peaks = _Peaks(stack, exclusive=sides[-1].exclusive)
        for number in range(values.rounds):
            for side in sides:
                tell(f"round {number + 1} of {values.rounds}: {side.name}")
                side.turn(values.steps)
            peaks.turn()
        tell("")
        best = peaks.best()
        return {
            "config": values.config,
            "overrides": overrides,
            "phase": values.phase,
            "rounds": values.rounds,
            "steps": values.steps,
            "matrix_product_peak": best,
            "sides": [side.result(best) for side in sides],
            "ratios": [_ratio(side, sides[0]) for side in sides[1:]],
        }


# --- the sides ------------------------------------------------------------------------------------


class _Side(abc.ABC):
    """A worker that takes turns. `facts` is what it told about itself when it started."""

    name: str
    text: str
    facts: dict[str, Any]

    def __init__(self, stack: contextlib.ExitStack):
        self._stack = stack
        self._worker: Worker | None = None
        self.turns: list[dict[str, Any]] = []
        # One process at a time can hold a TPU, so its workers end after every turn.
        self.exclusive = False
        stack.callback(self.close)

    @abc.abstractmethod
    def prepare(self) -> None:
        """Compiles, so that the first turn starts at once."""

    @abc.abstractmethod
    def start(self) -> Worker:
        """A new worker process, ready for turns."""

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def turn(self, steps: int) -> None:
        self._worker = self._worker or self.start()
        self.turns.append(self._worker.ask("turn", steps=steps))
        if self.exclusive:
            self.close()

    def speeds(self) -> list[float]:
        """Tokens a second of every round, from its median step."""
        tokens = self.facts["batch"] * self.facts["length"]
        return [tokens / spread(turn["step_seconds"])["median"] for turn in self.turns]

    def result(self, peaks: dict[str, Any]) -> dict[str, Any]:
        """Everything measured on this side."""
        seconds = [second for turn in self.turns for second in turn["step_seconds"]]
        last = self.turns[-1]
        return {
            "name": self.name,
            "setting": self.text,
            **self.facts,
            "tokens_per_second": spread(self.speeds()),
            "step_seconds": spread(seconds),
            "turns": [turn["step_seconds"] for turn in self.turns],
            "peak_memory_bytes": max(turn["peak_memory_bytes"] for turn in self.turns),
            "memory_of": last["memory_of"],
            "loss": last["loss"],
        }


class _JaxSide(_Side):
    def __init__(
        self,
        name: str,
        setting: Setting,
        config: str,
        overrides: list[str],
        phase: int,
        stack: contextlib.ExitStack,
    ):
        super().__init__(stack)
        self.name, self.text, self._environment = name, setting.text, setting.environment
        self._question: dict[str, Any] = {
            "config": config,
            "overrides": overrides + setting.overrides,
            "phase": phase,
        }
        self._cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-cache-"))

    def prepare(self) -> None:
        with self._new_worker() as worker:
            cold = worker.ask("start", only_compile=True, **self._question)
        self.exclusive = cold["platform"] == "tpu"
        self._worker = self.start()
        warm = self.facts["compile_seconds"]
        self._compile_seconds = {"cold": cold["compile_seconds"], "warm": warm}
        if self.exclusive:
            self.close()

    def start(self) -> Worker:
        worker = self._new_worker()
        self.facts = worker.ask("start", only_compile=False, **self._question)
        return worker

    def result(self, peaks: dict[str, Any]) -> dict[str, Any]:
        result = super().result(peaks)
        facts, peak = self.facts, peaks[self.facts["model"]["dtype"]]
        # The simulated devices of a CPU share its cores.
        devices = 1 if facts["platform"] == "cpu" else facts["devices"]
        needed = result["tokens_per_second"]["median"] * facts["flops_per_token"]
        mfu = needed / (devices * peak["flops_per_second"])
        return {**result, "mfu": mfu, "compile_seconds": self._compile_seconds}

    def _new_worker(self) -> Worker:
        cache = {
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": self._cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        return Worker("tools.bench.jax_worker", environment=_SHARED | cache | self._environment)


class _TorchSide(_Side):
    def __init__(self, python: str, arguments: list[str], stack: contextlib.ExitStack):
        super().__init__(stack)
        self.name, self.text = "torch", shlex.join(arguments)
        self._python, self._arguments = python, arguments

    def prepare(self) -> None:
        self._worker = self.start()

    def start(self) -> Worker:
        worker = Worker("tools.bench.torch_worker", self._python)
        self.facts = worker.ask("start", arguments=self._arguments)
        return worker


# Processes that share a GPU must not take all of its memory at their start.
_SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class _Peaks:
    """FLOP/s of square matrix products, the best of all rounds."""

    def __init__(self, stack: contextlib.ExitStack, exclusive: bool):
        self._stack, self._exclusive = stack, exclusive
        self._worker: Worker | None = None
        self._best: dict[str, dict[str, Any]] = {}

    def turn(self) -> None:
        worker = self._worker or Worker("tools.bench.jax_worker", environment=_SHARED)
        if self._worker is None and not self._exclusive:
            self._worker = self._stack.enter_context(worker)
        for dtype, speeds in worker.ask("matrix_products")["flops_per_second"].items():
            for size, speed in speeds.items():
                if speed > self._best.get(dtype, {"flops_per_second": 0})["flops_per_second"]:
                    self._best[dtype] = {"flops_per_second": speed, "size": int(size)}
        if self._exclusive:
            worker.close()

    def best(self) -> dict[str, dict[str, Any]]:
        """By dtype: flops_per_second and the size that reached it."""
        return self._best


def torch_arguments(facts: dict[str, Any]) -> list[str]:
    """The flags of torch_llama.py that give a JAX side's shape, batch and dtype.

    Raises:
      UserError: the model or the optimiser is not the reference's.
    """
    model = facts["model"]
    llama = {
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "qk_norm": "none",
        "attention_bias": "none",
        "mlp_bias": False,
        "attention_soft_cap": None,
        "logits_soft_cap": None,
        "window": None,
    }
    for key, value in llama.items():
        if model[key] != value:
            raise UserError(f"--torch trains a Llama, where model.{key} is {value!r}.")
    if facts["head_dim"] * model["num_heads"] != model["embed_dim"]:
        raise UserError("--torch trains a Llama, where head_dim is embed_dim / num_heads.")
    if facts["optimizer"] != "adamw":
        raise UserError(f"--torch trains by AdamW, not by {facts['optimizer']}.")
    names = ("vocab_size", "embed_dim", "num_layers", "num_heads", "mlp_dim", "dtype")
    arguments = [f"--{name}={model[name]}" for name in names]
    arguments.append(f"--num_kv_heads={model['num_kv_heads'] or model['num_heads']}")
    arguments += [f"--{name}={facts[name]}" for name in ("batch", "length")]
    return arguments + ([] if model["tie_embeddings"] else ["--untied"])


def _ratio(side: _Side, first: _Side) -> dict[str, Any]:
    rounds = [a / b for a, b in zip(side.speeds(), first.speeds(), strict=True)]
    return {"of": side.name, "to": first.name, **spread(rounds), "rounds": rounds}
