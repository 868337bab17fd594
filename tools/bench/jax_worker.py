"""The worker of `tools.bench train` for one setting, and for the matrix-product peak."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from llm_jax.config import build
from llm_jax.data.corpus import MAIN
from llm_jax.data.phases import Phase, plan
from llm_jax.errors import UserError
from llm_jax.main import parse
from llm_jax.mesh import make_mesh
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.config import check_length
from llm_jax.models.size import flops_per_token, parameter_count
from llm_jax.objectives import lm
from llm_jax.trainers.foundation import asked_model
from llm_jax.trainers.pretrain import PretrainConfig
from tools.bench.bare_step import BareStep, matmul_flops, random_batches
from tools.bench.protocol import (
    Note,
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
    serve,
)

# Fresh tokens at every step would be a data pipeline; one batch alone would soon be learnt by
# heart, and its vanishing gradients are denormal numbers, which a CPU multiplies slowly.
BATCHES = 16
WARMUP_STEPS = 2
PEAK_SIZES = {"cpu": (512, 1024, 2048)}
ACCELERATOR_PEAK_SIZES = (2048, 4096, 8192)


class _Training:
    """One setting: its step is compiled by `start` and runs in turns."""

    def start(self, note: Note, config: str, overrides: list[str], phase: int, only_compile: bool):
        """Compiles the step and, unless `only_compile`, makes its state; tells what it is."""
        del note
        settings = read_config(config, overrides)
        model_config, planned = _model_and_phase(settings, phase)
        mesh = make_mesh(settings.mesh)
        jax.set_mesh(mesh)
        model = LanguageModel(model_config)
        shape = (planned.batch, planned.length)
        self.step = BareStep(
            settings, mesh, model.init, lm.make_objective(model, settings.loss), *shape
        )
        vocabulary = model_config.vocab_size or 0
        compile_seconds = self.step.compile(random_batches(vocabulary, *shape, mesh, 1)[0])
        self.before = resident_bytes()
        reset_peak()
        if not only_compile:
            self.step.start(random_batches(vocabulary, *shape, mesh, BATCHES))
        return {
            "compile_seconds": compile_seconds,
            "batch": planned.batch,
            "length": planned.length,
            "micro_batches": self.step.micro_batches,
            "attention": model.backend,
            "parameters": parameter_count(model_config),
            "flops_per_token": flops_per_token(model_config, planned.length),
            "head_dim": model_config.resolved_head_dim,
            "model": dataclasses.asdict(model_config),
            "optimizer": settings.optimizer.name,
            "platform": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "jax": jax.__version__,
        }

    def turn(self, note: Note, steps: int) -> dict[str, Any]:
        """Seconds of each of `steps` steps after a warm-up, the last loss and the peak memory."""
        del note
        self.step.run(WARMUP_STEPS)
        seconds = self.step.run(steps)
        return {"step_seconds": seconds, "loss": self.step.loss, **self._peak_memory()}

    def _peak_memory(self) -> dict[str, Any]:
        statistics = [device.memory_stats() for device in jax.local_devices()]
        if all(entry and "peak_bytes_in_use" in entry for entry in statistics):
            peak = max(entry["peak_bytes_in_use"] for entry in statistics)
            return {"peak_memory_bytes": peak, "memory_of": "fullest device"}
        return {
            "peak_memory_bytes": peak_resident_bytes() - self.before,
            "memory_of": "growth of the process",
        }


def read_config(config: str, overrides: list[str]) -> PretrainConfig:
    """The pre-training config of a config argument and `--config.KEY=VALUE` flags."""
    found, _ = parse(["tools.bench", f"--config={config}", *overrides])
    if found.get("trainer", None) != "pretrain":
        raise UserError(f"--config={config} is no pre-training config: its step is not known here.")
    return build(PretrainConfig, found)


def matrix_products(note: Note) -> dict[str, Any]:
    """FLOP/s of one device by dtype and size, measured once."""
    del note
    sizes = PEAK_SIZES.get(jax.default_backend(), ACCELERATOR_PEAK_SIZES)
    return {"flops_per_second": matmul_flops(sizes), "platform": jax.default_backend()}


def _model_and_phase(config: PretrainConfig, number: int) -> tuple[ModelConfig, Phase]:
    model = asked_model(config)
    if not 1 <= number <= len(config.phases):
        raise UserError(f"--phase={number}: the config has phases 1 to {len(config.phases)}.")
    phase = plan(config.phases, config.optimizer, model.rope, {MAIN: 1.0})[number - 1]
    check_length(model, phase.length)
    return dataclasses.replace(model, rope=phase.rope), phase


def main() -> None:
    training = _Training()
    serve({"start": training.start, "turn": training.turn, "matrix_products": matrix_products})
