"""Compiles a config's own programs for chips that need not be there, by the chips' real compiler.

libtpu holds the whole TPU compiler and describes slices by name, so a training step of any size can
be compiled, and its memory known to the byte, on a machine without a TPU. libtpu looks for its own
hardware where it is loaded: `prepare` tells it that there is none.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llm_jax import optim, sharding, step, weights
from llm_jax.data.phases import Phase
from llm_jax.errors import UserError
from llm_jax.generation import decoding
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.mesh import make_mesh
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.config import check_length
from llm_jax.models.pipeline import micro_batches_per_stage
from llm_jax.models.size import flops_per_token, keys_seen
from llm_jax.scaling import hlo, program, stages
from llm_jax.scaling.presets import Cluster, cluster_names, find_cluster
from llm_jax.types import TrainState, join


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    parameters, optimizer, other: arguments of the program: what it starts from. gradients: of all
    parameters, as the optimiser reads them. beside: weights of the reference that samples are
    compared with, which the program does not read. peak: the most that is held at once, all of this
    and activations, gathered parameters and buffers of the exchanges. host: in the host's memory.
    """

    parameters: int
    optimizer: int
    other: int
    gradients: int
    beside: int
    peak: int
    host: int

    @property
    def activations(self) -> int:
        """The rest of the peak: activations and all that the compiler keeps for a while."""
        known = self.parameters + self.optimizer + self.other + self.gradients + self.beside
        return max(0, self.peak - known)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program and what it does on one device.

    flops: of all its products and attention kernels. model_flops: of these, what the model needs
    however it is computed (`flops_per_token`), per device. traffic: bytes between main memory and
    core. seconds: that the compiler took.
    """

    name: str
    memory: Memory
    flops: float
    model_flops: float
    traffic: float
    collectives: tuple[program.Collective, ...]
    kernels: dict[str, float]
    seconds: float


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A program that the compiler refuses, since it needs more memory than a device has: `needed`
    bytes at least, None where the compiler does not say how much."""

    name: str
    needed: float | None
    seconds: float


def prepare() -> None:
    """Sets the environment in which libtpu compiles without a TPU. Before JAX starts a backend."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it waits for a server of Google Cloud
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def describe(name: str) -> tuple[Cluster, list[Any]]:
    """A TPU slice "v5e:4x4", or a cluster of `scaling.presets` by name, and its devices.

    Raises:
      UserError: no such slice, GPUs, or no compiler.
    """
    slices = {c.topology: c for c in map(find_cluster, cluster_names()) if c.topology}
    if ":" in name:
        if name not in slices:
            own = [n for n in slices if n.startswith(f"{name.partition(':')[0]}:")]
            raise UserError(f"there is no slice {name!r}. Known: {', '.join(own or slices)}.")
        cluster = slices[name]
    else:
        cluster = find_cluster(name)
    if cluster.topology is None:
        raise UserError(
            f"programs for GPUs are compiled where they run, not for {name}: name a TPU slice, "
            "such as v5e:4x4."
        )
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(
            cluster.topology, platform="tpu", num_slices=cluster.slices
        )
    except Exception as error:  # of no class of its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"the TPU compiler cannot describe {cluster.topology} ({reason}): "
            "pip install 'jax[tpu]' brings it."
        ) from error
    return cluster, list(described.devices)


def compile_train_step(config: Any, phase: Phase, devices: Sequence[Any]) -> Program | TooLarge:
    """The training step of one phase, as the loop runs it: forward, backward, optimiser.

    Args:
      config: of a stage that `scaling.stages` knows.

    Raises:
      UserError: a mesh that does not fit the devices, or does not divide the model or the batch.
    """
    mesh = make_mesh(config.mesh, devices)
    shapes = stages.of_phase(config, phase, mesh)
    pieces = micro_batches_per_stage(shapes.model.config, mesh)
    row = phase.length * phase.sequences
    parts = step.micro_batches(config.step, phase.batch, row, mesh, pieces)
    with jax.set_mesh(mesh):
        optimizer = optim.make_optimizer(
            config.optimizer, sharding.unbox(shapes.trained), shapes.model.config.width_multiplier
        )
        state, shardings = _abstract_state(config.seed, shapes, optimizer, mesh)
        train_step = step.make_train_step(
            shapes.objective,
            optimizer,
            mesh=mesh,
            shardings=shardings,
            micro_batches=1 if shapes.whole_batch else parts,
            parameter_dtype=config.step.parameter_dtype,
        )
        rate = jax.ShapeDtypeStruct((), jnp.float32)
        lowered = train_step.lower(state, shapes.batch, rate)
        beside = weights.abstract(mesh, stages.reference_of(config, shapes.model.config))
    tokens = phase.batch * phase.length / mesh.size
    of_several = "" if phase.sequences == 1 else f"{phase.sequences} x "
    return _compile(
        f"train, {phase.batch:,} rows of {of_several}{phase.length:,}",
        lowered,
        mesh,
        model_flops=sum(flops_per_token(m, phase.length) * n for m, n in shapes.reads) * tokens,
        attention=sum(_attention_flops(m, phase.length) * n for m, n in shapes.reads) * tokens,
        parameters=_bytes((state.params, state.frozen)),
        optimizer=_bytes(state.opt_state),
        gradients=_bytes(state.params),
        beside=_bytes(beside),
    )


def compile_decode_step(
    config: Any, rows: int, length: int, devices: Sequence[Any]
) -> Program | TooLarge:
    """One step of sampling, a token for each of `rows` rows that hold up to `length` tokens.

    Parameters are those that training holds, in its shards.

    Raises:
      UserError: see `compile_train_step`.
    """
    mesh = make_mesh(config.mesh, devices)
    model = LanguageModel(stages.model_of(config), devices[0].platform)
    check_length(model.config, length)
    sampler = SamplerConfig()
    with jax.set_mesh(mesh):
        trained, frozen = stages.weights_of(config, model.config)
        params = weights.abstract(mesh, join(trained, frozen))
        beside = weights.abstract(mesh, stages.reference_of(config, model.config))

        def token(params: Any, state: decoding.Decoding) -> decoding.Decoding:
            rng = jax.random.key(0)
            terms = decoding.Terms(rng, jnp.arange(rows), jnp.zeros((1,), jnp.int32))
            one = jnp.int32(1)
            return decoding.advance(model, params, state, terms, one, one, sampler=sampler)

        idle = jax.eval_shape(
            lambda: decoding.start_idle(model, sampler=sampler, rows=rows, length=length, room=1)
        )
        laid_out = decoding.shardings(mesh, idle)
        state = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), idle, laid_out
        )
        jitted = jax.jit(token, donate_argnums=1, out_shardings=laid_out)
        lowered = jitted.lower(params, state)
    whole = dataclasses.replace(model.config, lora=None)
    flops = flops_per_token(whole, length) / 3
    return _compile(
        f"decode, {rows:,} rows of up to {length:,}",
        lowered,
        mesh,
        model_flops=flops * rows / mesh.size,
        attention=0.0,  # einsum, which the products count
        parameters=_bytes(params),
        beside=_bytes(beside),
    )


def _abstract_state(
    seed: int, shapes: stages.Shapes, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """Shapes of the state with their shardings, and the shardings alone."""

    def zeros(rng: jax.Array) -> Any:
        del rng
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sharding.unbox(shapes.trained))

    where = sharding.parameter_shardings(mesh, shapes.trained)
    state, shardings = step.init_state(zeros, optimizer, seed, mesh, where)
    if shapes.frozen is None:
        return state, shardings
    frozen = weights.abstract(mesh, shapes.frozen)
    where = jax.tree.map(lambda x: x.sharding, frozen)
    return dataclasses.replace(state, frozen=frozen), dataclasses.replace(shardings, frozen=where)


def _compile(
    name: str,
    lowered: jax.stages.Lowered,
    mesh: Mesh,
    *,
    model_flops: float,
    attention: float,
    parameters: int,
    optimizer: int = 0,
    gradients: int = 0,
    beside: int = 0,
) -> Program | TooLarge:
    begin = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return TooLarge(name, _needed(str(error)), time.monotonic() - begin)
    seconds = time.monotonic() - begin
    module = hlo.parse(compiled.as_text() or "")
    held: Any = compiled.memory_analysis()
    kernels = program.kernel_calls(module)
    return Program(
        name=name,
        memory=Memory(
            parameters=parameters,
            optimizer=optimizer,
            other=held.argument_size_in_bytes - parameters - optimizer,
            gradients=gradients,
            beside=beside,
            peak=held.peak_memory_in_bytes + beside,
            host=held.host_temp_size_in_bytes + held.host_argument_size_in_bytes,
        ),
        # The compiler makes no matrix product of one row.
        flops=max(model_flops, program.matrix_flops(module) + attention * _passes(kernels)),
        model_flops=model_flops,
        traffic=program.memory_traffic(module),
        collectives=program.collectives(module, dict(mesh.shape)),
        kernels=kernels,
        seconds=seconds,
    )


def _attention_flops(config: ModelConfig, length: int) -> float:
    """Of a forward pass of attention's two products, a token of rows of `length`."""
    seen = sum(keys_seen(length, config.layer_window(i)) for i in range(config.num_layers))
    return 2 * 2 * config.num_heads * config.resolved_head_dim * seen


def _passes(kernels: dict[str, float]) -> float:
    """Work of the attention kernels, in forward passes of two products each.

    The backward kernels are two: that of the queries' gradient multiplies three times, that of
    keys' and values' four times. Rematerialisation runs the forward one again.
    """
    forward, backward = (
        sum(times for name, times in kernels.items() if part in name) for part in ("_fwd", "_dkv")
    )
    if not backward:
        return 1.0 if forward else 0.0
    return forward / backward + 3 / 2 + 4 / 2


def _needed(message: str) -> float | None:
    """Bytes that a program would need, from "Used 17.25G of 15.75G hbm", or of temporaries alone
    "(28.66G) exceeds"."""
    match = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", message)
    if match is None:
        return None
    number, unit = match[1] or match[3], match[2] or match[4]
    return float(number) * 1024 ** ("KMGT".index(unit) + 1)


def _bytes(tree: Any) -> int:
    """On one device, as the shardings of the leaves lay them out."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
