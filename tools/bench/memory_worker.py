"""The worker of `tools.bench memory`: one train step, predicted, compiled and run."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from llm_jax.mesh import make_mesh, resolve
from llm_jax.models import LanguageModel
from llm_jax.objectives import lm
from llm_jax.scaling.memory import training_memory
from llm_jax.trainers.foundation import asked_model
from tools.bench.bare_step import BareStep, random_batches
from tools.bench.jax_worker import read_config
from tools.bench.protocol import Note, peak_resident_bytes, reset_peak, resident_bytes, serve

STEPS = 3


def measure(note: Note, config: str, overrides: list[str]) -> dict[str, Any]:
    """Bytes of a train step: by the formula, by the compiler, and by how much the process grows.

    The compiler's are arguments and temporaries; what is donated counts once.
    """
    del note
    settings = read_config(config, overrides)
    (phase,) = settings.phases
    mesh = make_mesh(settings.mesh)
    model = LanguageModel(asked_model(settings))
    with jax.set_mesh(mesh):
        objective = lm.make_objective(model, settings.loss)
        step = BareStep(settings, mesh, model.init, objective, phase.batch, phase.length)
        batches = random_batches(model.vocab_size, phase.batch, phase.length, mesh, 1)
        step.compile(batches[0])
        predicted = training_memory(
            model.config, settings.optimizer, resolve(settings.mesh, jax.device_count()),
            length=phase.length, batch=phase.batch, micro_batches=step.micro_batches,
            chunk=settings.loss.chunk, platform="cpu",
        )  # fmt: skip
        before = resident_bytes()
        reset_peak()
        step.start(batches)
        step.run(STEPS)
        grown = peak_resident_bytes() - before
    assert np.isfinite(step.loss)
    return {
        "predicted_bytes": predicted.peak,
        "fullest": predicted.fullest,
        "compiled_bytes": step.compiled_bytes(),
        "resident_bytes": grown,
        "micro_batches": step.micro_batches,
    }


def main() -> None:
    serve({"measure": measure})
