"""The transformer's settings, checked when they are made."""

from __future__ import annotations

import dataclasses
import typing
from typing import Literal

from llm_jax.errors import UserError, did_you_mean
from llm_jax.models.eight_bit_product import Matmul
from llm_jax.models.lora import LoraConfig
from llm_jax.models.moe import MoeConfig
from llm_jax.models.pipeline import PipelineConfig
from llm_jax.models.remat import Remat
from llm_jax.models.rope import RopeConfig, rotated_dim

LayerKind = Literal["global", "local"]


# Fields of `ModelConfig` that a stage takes from its own config although the parameters come from a
# stage before it: nothing here changes what the inherited parameters mean.
RUNTIME_FIELDS = (
    "dtype",
    "matmul",
    "remat",
    "attention_backend",
    "context_attention",
    "residual_dropout",
    "attention_dropout",
    "neftune_alpha",
    "lora",
    "pipeline",
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder; every switch is independent of the others.

    A branch is what attention or MLP adds to the residual stream.
    """

    vocab_size: int | None = None  # None = the tokenizer's
    embed_dim: int = 256
    num_layers: int = 4
    num_heads: int = 4  # query heads
    num_kv_heads: int | None = None  # key/value heads that query heads share; None = num_heads
    head_dim: int | None = None  # None = embed_dim / num_heads
    mlp_dim: int = 704
    max_length: int = 131_072  # no position may reach it
    position: Literal["rotary", "learned"] = "rotary"  # learned: a table of max_length rows
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_epsilon: float = 1e-5
    norm_plus_one: bool = False  # norms multiply by 1 + scale, and scales start at 0
    norm_placement: Literal["before", "after", "both"] = "before"  # of each branch
    parallel_residual: bool = False  # the MLP reads what attention reads, not what it has added to
    # gelu is the tanh form, in geglu too; gelu_erf the exact one.
    mlp: Literal["swiglu", "geglu", "gelu", "gelu_erf"] = "swiglu"
    moe: MoeConfig | None = None  # experts in place of every MLP, each mlp_dim wide
    tie_embeddings: bool = True  # the output projection is the transposed embedding table
    scale_embeddings: bool = False  # by √embed_dim
    # Norm of queries and keys before RoPE: over each head, or over all heads together.
    qk_norm: Literal["none", "head", "all"] = "none"
    # Scores are divided by its square root; None = head_dim.
    query_pre_attention_scalar: int | None = None
    # Maximal update parameterization (arXiv:2203.03466; `llm_jax.mup` has the rules): embed_dim of
    # the base, a narrower model whose best learning rate serves this one, too; None = without.
    mup_base_width: int | None = None
    # The base's head_dim, from which on scores shrink by 1 / head_dim; None = this one's, where
    # width comes from more heads.
    mup_base_head_dim: int | None = None
    attention_bias: Literal["none", "qkv", "all"] = "none"  # all: the output projection too
    mlp_bias: bool = False
    attention_soft_cap: float | None = None  # scores ← cap · tanh(score / cap)
    logits_soft_cap: float | None = None
    window: int | None = None  # keys that a local layer sees, the query's own included
    # Kinds of layers, repeated over the depth; None = every layer local if there is a window.
    attention_pattern: tuple[LayerKind, ...] | None = None
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    local_rope: RopeConfig | None = None  # of the layers with a window; None = as the others
    residual_dropout: float = 0.0  # on what attention and MLP add to the residual stream
    attention_dropout: float = 0.0  # on attention weights; einsum backend only
    neftune_alpha: float = 0.0  # noise on embeddings in training (arXiv:2310.05914); about 5
    lora: LoraConfig | None = None  # the settings of adapters, where the parameters hold some
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products and activations
    # 8-bit operands in the projections of attention and MLP: in the forward product, or in the
    # gradient of its inputs, too. Embeddings, norms, attention and logits are as `dtype` says. All
    # compute everywhere; int8 is faster on TPUs v5e to v6e and on GPUs, fp8 on TPU 7x and on GPUs
    # that have it (Ada, Hopper and later).
    matmul: Matmul = "default"
    scan_layers: bool = False  # one compiled block, looped: compiles faster, fuses less
    # What is kept for the backward pass, from all activations (none) to only the input of each
    # block (full), or that in the host's memory (offload); `models/remat.py` has the table.
    remat: Remat = "none"
    # Of the micro-batches through the stages of the mesh, where it has more than one.
    pipeline: PipelineConfig = dataclasses.field(default_factory=PipelineConfig)
    attention_backend: Literal["auto", "einsum", "xla", "cudnn", "splash"] = "auto"
    # Where config.mesh.context splits rows: keys and values go round the devices, or every device
    # gathers all of them for a layer at a time.
    context_attention: Literal["ring", "all_gather"] = "ring"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads",
                     "head_dim", "mlp_dim", "max_length", "window", "mup_base_width",
                     "mup_base_head_dim"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"model.{name}={value} must be positive.")
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} is not a multiple of "
                f"model.num_kv_heads={self.kv_heads}: make it one."
            )
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise UserError(
                f"model.embed_dim={self.embed_dim} is not a multiple of "
                f"model.num_heads={self.num_heads}: make it one, or set model.head_dim."
            )
        if self.position == "rotary":
            self._check_rope()
        for name in ("residual_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must lie in [0, 1).")
        if not self.neftune_alpha >= 0:
            raise UserError(f"model.neftune_alpha={self.neftune_alpha} must not be negative.")
        for name in ("attention_soft_cap", "logits_soft_cap", "query_pre_attention_scalar"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"model.{name}={value} must be positive; leave it out for none.")
        if self.mup_base_head_dim is not None and self.mup_base_width is None:
            raise UserError("model.mup_base_head_dim is muP's: set model.mup_base_width, too.")
        if self.local_rope is not None and self.window is None:
            raise UserError("model.local_rope is that of layers with a window: set model.window.")
        if self.parallel_residual and self.norm_placement != "before":
            raise UserError("model.parallel_residual needs model.norm_placement='before'.")
        for name, choices in (("matmul", Matmul), ("remat", Remat)):
            value, known = getattr(self, name), typing.get_args(choices)
            if value not in known:
                raise UserError(f"model.{name}={value!r} is unknown.{did_you_mean(value, known)}")
        for name, value in (("moe", self.moe), ("lora", self.lora)):
            if self.matmul != "default" and value is not None:
                raise UserError(
                    f"model.matmul={self.matmul!r} is for dense kernels that are trained, and "
                    f"model.{name} has others: leave one of the two out."
                )
        self._check_pattern()

    def _check_rope(self) -> None:
        if self.resolved_head_dim % 2:
            raise UserError(
                f"model.head_dim={self.resolved_head_dim} is odd, and RoPE turns pairs of "
                "dimensions: make it even."
            )
        if not rotated_dim(self.rope, self.resolved_head_dim):
            raise UserError(
                f"model.rope.fraction={self.rope.fraction} leaves no pair of the "
                f"{self.resolved_head_dim} head dimensions to rotate: raise it."
            )

    def _check_pattern(self) -> None:
        if self.attention_pattern is None:
            return
        unknown = set(self.attention_pattern) - {"global", "local"}
        if unknown or not self.attention_pattern:
            raise UserError(
                f"model.attention_pattern={self.attention_pattern} must be a tuple of 'global' "
                "and 'local'."
            )
        if ("local" in self.attention_pattern) != (self.window is not None):
            raise UserError(
                f"model.attention_pattern={self.attention_pattern} and model.window={self.window} "
                "do not fit: a window needs a 'local' layer, and a 'local' layer a window."
            )
        if self.scan_layers and self.num_layers % len(self.attention_pattern):
            raise UserError(
                f"model.scan_layers needs model.num_layers={self.num_layers} to be a multiple of "
                f"the {len(self.attention_pattern)} layers of model.attention_pattern."
            )

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.kv_heads

    @property
    def resolved_head_dim(self) -> int:
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer of the repeated pattern; None sees all before it."""
        if self.attention_pattern is None:
            return (self.window,)
        return tuple(self.window if kind == "local" else None for kind in self.attention_pattern)

    def layer_window(self, layer: int) -> int | None:
        return self.windows[layer % len(self.windows)]

    @property
    def attention_scale(self) -> float:
        """What scores, products of queries and keys, are multiplied by."""
        head_dim = self.resolved_head_dim
        base = self.mup_base_head_dim or head_dim
        return (self.query_pre_attention_scalar or base) ** -0.5 * (base / head_dim)

    @property
    def width_multiplier(self) -> float:
        """How many times wider than muP's base the model is; 1 without muP."""
        return 1.0 if self.mup_base_width is None else self.embed_dim / self.mup_base_width


def check_length(config: ModelConfig, length: int) -> None:
    """Raises UserError where rows of `length` tokens pass the model's table of positions."""
    if length > config.max_length:
        raise UserError(
            f"length {length} is past the positions of model.max_length={config.max_length}: "
            "shorten the length, or raise model.max_length (with a fitting model.rope)."
        )
