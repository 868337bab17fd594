"""The jitted train step alone: no data pipeline, no log, no checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax import optim, sharding, step
from llm_jax.models.pipeline import micro_batches_per_stage
from llm_jax.trainers.pretrain import PretrainConfig
from llm_jax.types import Batch


class BareStep:
    """The train step that the loop would compile for `batch` rows of `length` tokens.

    Wants `jax.set_mesh(mesh)` while it is used.

    Args:
      config: optimiser, micro-batches and seed are used.
      init_params: `(rng) → tree of sharding.Named`.
    """

    def __init__(
        self,
        config: PretrainConfig,
        mesh: Mesh,
        init_params: Callable[[jax.Array], Any],
        objective: step.Objective,
        batch: int,
        length: int,
    ):
        boxed = jax.eval_shape(init_params, jax.random.key(0))
        self._optimizer = optim.make_optimizer(
            config.optimizer, sharding.unbox(boxed), config.model.width_multiplier
        )
        self._init = lambda rng: sharding.unbox(init_params(rng))
        self._seed = config.seed
        self._abstract, self._shardings = step.init_state(
            self._init,
            self._optimizer,
            config.seed,
            mesh,
            sharding.parameter_shardings(mesh, boxed),
        )
        self.micro_batches = step.micro_batches(
            config.step, batch, length, mesh, micro_batches_per_stage(config.model, mesh)
        )
        self._step = step.make_train_step(
            objective,
            self._optimizer,
            mesh=mesh,
            shardings=self._shardings,
            micro_batches=self.micro_batches,
            parameter_dtype=config.step.parameter_dtype,
        )
        self._rate = np.float32(config.optimizer.learning_rate)
        self._done = 0

    def compile(self, batch: Batch) -> dict[str, float]:
        """Compiles for batches like this one (shapes suffice); returns the seconds that it took."""
        begin = time.perf_counter()
        lowered = self._step.lower(self._abstract, batch, self._rate)
        middle = time.perf_counter()
        self._compiled = lowered.compile()
        return {"tracing": middle - begin, "compiling": time.perf_counter() - middle}

    def compiled_bytes(self) -> int:
        """Of the compiled step: arguments, results and temporaries, donated buffers once."""
        found: Any = self._compiled.memory_analysis()
        held = found.argument_size_in_bytes + found.output_size_in_bytes
        return held - found.alias_size_in_bytes + found.temp_size_in_bytes

    def start(self, batches: Sequence[Batch]) -> None:
        """Makes the initial state; the steps will take these batches in turn."""
        self._batches = batches
        self._state = step.materialise(self._init, self._optimizer, self._seed, self._shardings)
        jax.block_until_ready(self._state)

    def run(self, steps: int) -> list[float]:
        """Seconds of each of `steps` steps, issued as the loop does: one ahead of the device."""
        marks = [time.perf_counter()]
        before = None
        for _ in range(steps):
            batch = self._batches[self._done % len(self._batches)]
            self._state, metrics = self._compiled(self._state, batch, self._rate)
            self._done += 1
            if before is not None:
                jax.block_until_ready(before)
                marks.append(time.perf_counter())
            before = metrics
        self.loss = float(jax.device_get(before)["loss"].value())
        marks.append(time.perf_counter())
        return np.diff(marks).tolist()


def random_batches(vocabulary: int, batch: int, length: int, mesh: Mesh, count: int) -> list[Batch]:
    """Rows of random tokens without padding, on the mesh."""
    rng = np.random.default_rng(0)
    shape = (batch, length)

    def one() -> Batch:
        tokens = rng.integers(vocabulary, size=(batch, length + 1), dtype=np.int32)
        return Batch(
            tokens=tokens[:, :-1],
            targets=tokens[:, 1:],
            loss_weights=np.ones(shape, np.float32),
            segment_ids=np.ones(shape, np.int32),
            positions=np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        )

    return [jax.device_put(one(), sharding.batch_sharding(mesh)) for _ in range(count)]


def matmul_flops(sizes: Sequence[int], calls: int = 2) -> dict[str, dict[str, float]]:
    """FLOP/s of square matrix products on the first device, by dtype and size.

    bfloat16 operands give a float32 product, as they accumulate in a model.
    """
    found: dict[str, dict[str, float]] = {"float32": {}, "bfloat16": {}}
    for dtype, size in ((dtype, size) for dtype in found for size in sizes):
        a = jax.device_put(np.ones((size, size), np.float32), jax.devices()[0]).astype(dtype)
        _product(a, a).block_until_ready()
        begin = time.perf_counter()
        for _ in range(calls):
            product = _product(a, a)
        product.block_until_ready()
        found[dtype][str(size)] = calls * 2 * size**3 / (time.perf_counter() - begin)
    return found


@jax.jit
def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.numpy.matmul(a, b, preferred_element_type=np.float32)
