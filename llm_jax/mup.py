"""Maximal update parameterization (muP): one learning rate for models of all widths.

Yang et al. 2022 (arXiv:2203.03466), in the form of their table 8, which lets embeddings be tied.
With `model.mup_base_width` a model is m = embed_dim / mup_base_width times as wide as its base (so
are, in proportion, its heads together and its MLP), and differs from one without muP in

    parameter                                 start                  learning rate    used as
    embeddings, norms, biases                 as ever                as ever          as ever
    kernels of attention, MLP and experts     as ever: 1/√fan in     ÷ m; Muon: ÷ √m  as ever
    output projection (tied: the embedding)   that of the base       as ever          logits ÷ m
    router, heads, A of adapters              router: ÷ √m           ÷ m              as ever
    scores                                                                            see below

so that every layer's outputs change by as much in a step as the base's do, whatever the width. What
feeds few outputs (experts, a reward, the rank of an adapter) from many inputs is like an output
projection; a reward head and A start as ever. B of adapters and DoRA's magnitudes learn as ever.

Adam's and Lion's updates have entries of one size: along an input that they agree with they add up
over the fan in, hence ÷ m. Muon's are orthogonal, with a norm that grows as √m for entries of one
size, hence ÷ √m (the spectral condition, arXiv:2310.17813).

Where heads get wider instead of more, `model.mup_base_head_dim` makes scores q·k/√base · base /
head_dim instead of q·k/√head_dim: queries and keys come to agree, and their product then grows with
the head dimension, not its root.

Weight decay is multiplied by the learning rate before that is scaled, so it pulls at kernels of all
widths alike (independent weight decay; arXiv:2510.19093 finds that learning rates then carry over).
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import optax

from llm_jax.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.heads import HEADS
from llm_jax.models.kernels import LAYOUTS
from llm_jax.models.lora import ADAPTERS
from llm_jax.models.moe import KERNEL_AXES

if TYPE_CHECKING:
    from llm_jax.optim import OptimizerConfig


def scale_by_width(
    config: OptimizerConfig, params: Any, width_multiplier: float
) -> optax.GradientTransformation:
    """Multiplies each parameter's update by what muP makes of its learning rate.

    Args:
      params: the parameters or their shapes; only names count.
      width_multiplier: m, how many times wider than its base the model is.

    Raises:
      UserError: updates of a size for which muP has no rule.
    """
    if config.name == "adafactor" and config.parameter_scale:
        raise UserError(
            "config.optimizer.parameter_scale=True makes updates as large as the parameters, for "
            "which muP has no rule: turn it off, or leave out config.model.mup_base_width."
        )
    scales = learning_rate_scales(params, width_multiplier, config.name)
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda scale, x: scale * x, scales, updates)
    )


def learning_rate_scales(params: Any, width_multiplier: float, optimizer: str) -> Any:
    """A tree like `params` of the numbers (float) that multiply their learning rates.

    Args:
      optimizer: "muon", or one whose updates have entries of one size.
    """

    def scale(path: Any, _: Any) -> float:
        names = ["", *(str(getattr(key, "key", key)) for key in path)]
        *_, module, name = names
        if (module in LAYOUTS and name == "kernel") or (module == "moe" and name in KERNEL_AXES):
            return 1 / (math.sqrt(width_multiplier) if optimizer == "muon" else width_multiplier)
        narrow = name == "router" or module in HEADS or (ADAPTERS in names and name == "a")
        return 1 / width_multiplier if narrow else 1.0

    return jax.tree_util.tree_map_with_path(scale, params)


def without_mup(model: ModelConfig) -> ModelConfig:
    """The settings of the same function without muP, of parameters that `folded` has changed.

    Raises:
      UserError: scores are divided by what is the root of no whole number.
    """
    if model.mup_base_width is None:
        return model
    scalar = model.query_pre_attention_scalar
    if model.attention_scale != (scalar or model.resolved_head_dim) ** -0.5:
        scalar = round(model.attention_scale**-2)
        if not math.isclose(scalar**-0.5, model.attention_scale):
            raise UserError(
                f"model.mup_base_head_dim={model.mup_base_head_dim} divides scores by the root of "
                f"{model.attention_scale**-2:g}, and without muP that must be a whole number."
            )
    return dataclasses.replace(
        model, mup_base_width=None, mup_base_head_dim=None, query_pre_attention_scalar=scalar
    )


def folded(params: Any, model: ModelConfig) -> Any:
    """The parameters for `without_mup(model)`: the final norm divides what the logits did, and the
    kernels of heads make up for it."""
    m = model.width_multiplier
    if m == 1:
        return params
    norm = jax.tree.map(lambda x: x / m, params["final_norm"])
    if model.norm_plus_one:
        norm["scale"] += 1 / m - 1
    heads = {name: jax.tree.map(lambda x: x * m, params[name]) for name in HEADS if name in params}
    return {**params, "final_norm": norm, **heads}


def widened(model: ModelConfig, embed_dim: int) -> ModelConfig:
    """The model at another width: as many times more heads of the same size, and a wider MLP.

    Raises:
      UserError: a width at which heads or MLP would not be whole numbers.
    """

    def at_width(name: str, size: int) -> int:
        if size * embed_dim % model.embed_dim:
            raise UserError(
                f"at width {embed_dim} model.{name} would be "
                f"{size * embed_dim / model.embed_dim:g}, from {size} at width {model.embed_dim}: "
                "choose another width."
            )
        return size * embed_dim // model.embed_dim

    return dataclasses.replace(
        model,
        embed_dim=embed_dim,
        num_heads=at_width("num_heads", model.num_heads),
        num_kv_heads=at_width("num_kv_heads", model.kv_heads),
        head_dim=model.resolved_head_dim,
        mlp_dim=at_width("mlp_dim", model.mlp_dim),
    )
