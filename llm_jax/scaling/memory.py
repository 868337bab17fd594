"""What training and generating take of a device's memory, component by component, in bytes.

State comes from the parameters' shapes and the sharding rules; activations from what JAX keeps of
one layer between its forward and its backward pass, which tracing tells without a device.

Three points of a step are looked at, because any of them may be the fullest: the loss, where the
logits are; the backward pass, where one layer is at work while the inputs of all before it wait;
and the update, where gradients and updates stand side by side.

Legend: B batch, T time, D embed, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llm_jax import sharding
from llm_jax.interop.plan import Plan, PlannedParameter, plan
from llm_jax.mesh import MeshConfig
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.attention import choose_backend
from llm_jax.models.layers import GATED
from llm_jax.models.quantize import quantize
from llm_jax.optim import MUON_KERNELS, OptimizerConfig
from llm_jax.scaling.divisibility import batch_shards
from llm_jax.weights import shapes

# optax's scale_by_factored_rms factors a parameter whose second largest dimension reaches this.
FACTORED_SIZE = 128
FLASH_BACKENDS = ("cudnn", "splash")  # of attention: they keep no scores

Bytes = dict[str, float]
Platform = Literal["cpu", "gpu", "tpu"]
WeightKind = Literal["float32", "bfloat16", "int8", "nf4"]


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device.

    state: what stands between steps, by component. points: what a step holds on top of it, at each
    of its points, by component.
    """

    state: Bytes
    points: dict[str, Bytes]

    @property
    def state_bytes(self) -> float:
        return sum(self.state.values())

    @property
    def fullest(self) -> str:
        """The point of a step that takes the most."""
        return max(self.points, key=lambda point: sum(self.points[point].values()))

    @property
    def peak(self) -> float:
        return self.state_bytes + sum(self.points[self.fullest].values())


def training_memory(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    mesh: MeshConfig,
    *,
    length: int,
    batch: int,
    micro_batches: int = 1,
    chunk: int | None = None,
    platform: Platform,
) -> TrainingMemory:
    """Bytes of a train step with float32 parameters on one device of a mesh.

    A pipeline is taken to have as many micro-batches in flight as stages.

    Args:
      mesh: without -1.
      length: tokens a row. batch: rows of the global batch.
      micro_batches: into which every device's part is cut; their gradients are summed.
      chunk: positions of a row whose logits are held at once; None = all.
      platform: whose attention is used, and whose XLA compiles.

    Raises:
      UserError: the mesh does not divide the model.
    """
    planned = plan(model, mesh)
    gradients = {"gradients": planned.float32_bytes}
    before = {}
    if micro_batches > 1:
        before = {"gradients of earlier micro-batches": planned.float32_bytes}
    rows = batch / batch_shards(mesh) / micro_batches
    tokens = rows * length / mesh.context
    points = _points(model, mesh, planned, tokens, length, chunk, platform)
    moments = optimizer_bytes(planned, optimizer)
    # Between updates the host holds them.
    offloaded = moments if optimizer.offload else {}
    return TrainingMemory(
        state={"parameters": planned.float32_bytes, **({} if offloaded else moments)},
        points={
            **{point: {**gradients, **before, **held} for point, held in points.items()},
            "update": {**gradients, **offloaded},
        },
    )


# --- state ----------------------------------------------------------------------------------------


def optimizer_bytes(planned: Plan, optimizer: OptimizerConfig) -> Bytes:
    """The optimiser's state on one device, by component; its few scalars are left out.

    Moments are laid out as their parameters are. Adafactor's factored ones have shapes of their own
    and lie whole on every device.
    """
    first_width, second_width = (
        jnp.dtype(dtype).itemsize for dtype in (optimizer.mu_dtype, optimizer.nu_dtype)
    )
    values = sum(p.chip_values for p in planned.parameters)
    muon = sum(p.chip_values for p in planned.parameters if _is_muon_kernel(p))
    by_name: dict[str, Bytes] = {
        "adamw": {"first moment": first_width * values, "second moment": second_width * values},
        "lion": {"first moment": first_width * values},
        "muon": {
            "first moment": first_width * values,
            "second moment": second_width * (values - muon),
        },
        "adafactor": {"second moment": sum(map(_factored_bytes, planned.parameters))},
    }
    found = by_name[optimizer.name]
    if optimizer.ema_decay is not None:
        found["average of the parameters"] = 4 * values
    return found


def checkpoint_bytes(planned: Plan, optimizer: OptimizerConfig) -> float:
    """A checkpoint: parameters and optimiser state, of all devices, each stored once."""
    whole = dataclasses.replace(
        planned,
        parameters=tuple(dataclasses.replace(p, chip_shape=p.shape) for p in planned.parameters),
    )
    return whole.float32_bytes + sum(optimizer_bytes(whole, optimizer).values())


def _is_muon_kernel(parameter: PlannedParameter) -> bool:
    return any(f"/{parameter.name}".endswith(f"/{end}") for end in MUON_KERNELS)


def _factored_bytes(parameter: PlannedParameter) -> float:
    """Sums over rows and over columns of the two largest dimensions, or the whole; and the
    placeholders that optax keeps for what it does not need."""
    if len(parameter.shape) < 2 or sorted(parameter.shape)[-2] < FACTORED_SIZE:
        return 4 * (parameter.chip_values + 2 * parameter.count)
    size = math.prod(parameter.shape)
    columns, rows = sorted(parameter.shape)[-2:]
    return 4 * parameter.count * (size // rows + size // columns + 1)


# --- activations ----------------------------------------------------------------------------------


def _points(
    model: ModelConfig, mesh: MeshConfig, planned: Plan, tokens: float, length: int,
    chunk: int | None, platform: Platform,
) -> dict[str, Bytes]:  # fmt: skip
    """Activations, and what parameters take beside themselves, at the loss and further back.

    Rows outside the layers are split over the stages too; inside, every stage keeps its own layers'
    inputs of the rows of all stages, which comes to the same.
    """
    assert model.vocab_size is not None
    width = jnp.dtype(model.dtype).itemsize
    layers = functools.partial(
        _kept_of_layer, mesh=mesh, tokens=tokens, length=length, platform=platform
    )
    stacked = model
    if platform == "cpu":
        # Its XLA widens what has 16 bits as soon as it is computed, and keeps it so for later; what
        # full rematerialisation keeps, ahead of the loop backwards.
        stacked = dataclasses.replace(model, dtype="float32")
    saved: Bytes = {"saved activations": model.num_layers * layers(stacked)}
    hidden = tokens * model.embed_dim / mesh.tensor  # values
    held = tokens if chunk is None else tokens * min(1, chunk / length)
    # Where parameters are split, a product needs them whole, and their gradient is whole at first.
    gathered = width + 4 if mesh.fsdp * mesh.context > 1 else 0
    output = model.vocab_size * model.embed_dim / mesh.tensor
    at_work = layers(dataclasses.replace(model, remat="none"))
    if model.remat not in ("none", "full", "offload"):  # what is saved is not computed again
        at_work -= layers(model) - layers(dataclasses.replace(model, remat="full"))
    layer: Bytes = {
        "one layer's activations": at_work,
        "hidden states": 2 * width * hidden,
    }
    if platform == "cpu" and width < 4:  # elsewhere rounding is part of the product
        layer["a product in float32"] = 4 * tokens * _widest_product(model) / mesh.tensor
    if gathered:
        layer["one layer's parameters, gathered"] = gathered * _layer_values(planned, model, mesh)
    if mesh.tensor > 1:
        layer["inputs of products, gathered"] = 2 * width * (tokens * model.embed_dim - hidden)
    return {
        "loss": {
            **saved,
            "logits and their gradient": 2 * 4 * held * model.vocab_size / mesh.tensor,
            "hidden states": (3 * 4 + width) * hidden,
            "output projection": max(gathered, 4) * output,
        },
        "backward": {**saved, **layer},
    }


def _widest_product(model: ModelConfig) -> int:
    """Values a token of the largest product of a layer."""
    mlp = (2 if model.mlp in GATED else 1) * model.mlp_dim
    if model.moe is not None:
        mlp *= model.moe.experts_per_token
    return max(mlp, (model.num_heads + 2 * model.kv_heads) * model.resolved_head_dim)


def _layer_values(planned: Plan, model: ModelConfig, mesh: MeshConfig) -> float:
    """Parameters of one layer on a device, were they not split by their embed dimension."""

    def gathered(parameter: PlannedParameter) -> int:
        axes = {axis for entry in parameter.spec for axis in sharding.mesh_axes(entry)}
        ways = (getattr(mesh, axis) for axis in (*sharding.RULES["embed"], "stage") if axis in axes)
        return parameter.chip_values * math.prod(ways)

    layers = (p for p in planned.parameters if p.name.startswith("layer"))
    return sum(map(gathered, layers)) / model.num_layers


def _kept_of_layer(
    model: ModelConfig, *, mesh: MeshConfig, tokens: float, length: int, platform: Platform
) -> float:
    """Bytes that a layer keeps for its backward pass of `tokens` tokens in rows of `length`.

    The tensor axis splits the residual stream between the products, and heads and MLPs inside. The
    tokens that an expert axis brings together are counted for each of its devices.
    """
    if model.remat == "offload":  # the layer's input, in the host's memory
        return 0
    if model.remat == "full":  # the layer's input
        return tokens * model.embed_dim * jnp.dtype(model.dtype).itemsize / mesh.tensor
    attention = choose_backend(model, platform)

    def kept(model: ModelConfig) -> float:
        if attention in FLASH_BACKENDS:
            return _kept_per_token(model)
        return _kept_per_row(model, length) / length

    per_token = kept(model)
    if model.moe is not None and mesh.expert > 1:
        without = dataclasses.replace(model, moe=None, mlp_dim=1)
        per_token += (mesh.expert - 1) * (per_token - kept(without))
    return per_token * tokens / mesh.tensor / len(model.windows)


@functools.lru_cache(maxsize=256)
def _kept_per_row(model: ModelConfig, length: int) -> float:
    """Bytes that one repetition of the layers' pattern keeps of a row, scores among them."""
    return _stacked_bytes(model, 2, length) - _stacked_bytes(model, 1, length)


@functools.lru_cache(maxsize=256)
def _kept_per_token(model: ModelConfig) -> float:
    """Bytes a token that one repetition of the layers' pattern keeps without scores, which are what
    grows with the square of the length."""
    time = 64  # twice as many still are one block of the einsum backend
    one, two, long = (
        _stacked_bytes(model, rows, time) for rows, time in ((1, time), (2, time), (1, 2 * time))
    )
    per_pair = (long - two) / (2 * time**2)
    return (two - one) / time - per_pair * time


def _stacked_bytes(model: ModelConfig, rows: int, time: int) -> float:
    """Bytes, for one of the layers, of what the backward pass of a few stacked ones reads."""
    repetitions = 7  # no other dimension of what is kept begins with it
    model = dataclasses.replace(
        model,
        vocab_size=64,
        num_layers=repetitions * len(model.windows),
        max_length=max(model.max_length, 2 * time),
        scan_layers=True,
        attention_backend="einsum",
        lora=None,
    )
    language_model = LanguageModel(model)

    def kept(rng: jax.Array, tokens_BT: jax.Array) -> Any:
        params = sharding.unbox(language_model.init(rng))
        ids_BT = jnp.ones_like(tokens_BT)

        def forward(params: Any) -> Any:
            return language_model.apply(params, tokens_BT, segment_ids=ids_BT)[0]

        return jax.vjp(forward, params)[1]

    tokens_BT = jax.ShapeDtypeStruct((rows, time), jnp.int32)
    leaves = jax.tree.leaves(jax.eval_shape(kept, jax.random.key(0), tokens_BT))
    stacked = [leaf for leaf in leaves if leaf.shape[:1] == (repetitions,)]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in stacked) / repetitions


# --- generation -----------------------------------------------------------------------------------


def weight_bytes(model: ModelConfig, kind: WeightKind) -> float:
    """All weights to serve with: in a floating-point type, or projections in few bits and the rest
    in float32 (`models.quantize`)."""
    tree = sharding.unbox(shapes(model))
    if kind in ("int8", "nf4"):
        tree = jax.eval_shape(functools.partial(quantize, kind=kind), tree)
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return jnp.dtype(kind).itemsize * sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def cache_bytes(model: ModelConfig, batch: int, length: int) -> float:
    """Keys and values of `batch` rows of `length` tokens, a slot for every token in every layer."""
    slots = batch * length * model.num_layers
    return 2 * slots * model.kv_heads * model.resolved_head_dim * jnp.dtype(model.dtype).itemsize


def windowed_cache_bytes(model: ModelConfig, batch: int, length: int) -> float:
    """The least that would do: `cache_bytes` without what lies before the windows."""
    windows = (model.layer_window(layer) for layer in range(model.num_layers))
    seen = sum(length if window is None else min(window, length) for window in windows)
    return cache_bytes(model, batch, length) * seen / (length * model.num_layers)
