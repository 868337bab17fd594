"""Rematerialisation: what the forward pass keeps of a layer, and what is computed again behind it.

The model names its activations, and a policy keeps some of the names. Of each token in each layer,
with b bytes a number (2 in bfloat16), and for Llama 2 7B in bfloat16:

  policy              keeps                                  bytes              7B  computes again
  full                block_input                            bD              8 KiB  everything
  save_attention      + attention_output and its logsumexp   + bNH + 4N     16 KiB  all but kernels
  save_qkv_attention  + qkv, rotated                         + b(N + 2K)H   40 KiB  output and MLP
  save_products       + attended, gate_up                    + bD + 2bM     91 KiB  no product
  none                the operands of every operation                               nothing
  offload             block_input, in the host's memory      0 (host: bD)        0  everything

D embed, N query heads, K key/value heads, H head dimension, M mlp (without a gate bM for 2bM). The
kernels are splash and cuDNN's; the backends einsum and xla have no logsumexp and compute scores
again under all policies but "none". Norms of queries and keys, or behind a branch, need what stands
before them: with these, save_qkv_attention and save_products do run some products again.

"dots" keeps the results of all products and "dots_no_batch" those with parameters, in float32, as
`product` returns them; flash kernels run again.

Activations in the host's memory (ZeRO-R, arXiv:1910.02054) go and come while other layers compute.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

Remat = Literal[
    "none", "full", "save_attention", "save_qkv_attention", "save_products", "offload",
    "dots", "dots_no_batch",
]  # fmt: skip
Name = Literal["block_input", "qkv", "attention_output", "attended", "gate_up"]

# cuDNN's forward kernel gives its logsumexp no name: its results are kept as those of a primitive.
FLASH_PRIMITIVES = ("dot_product_attention_fwd_wrapper",)

_ATTENTION: tuple[Name, ...] = ("attention_output",)
_QKV: tuple[Name, ...] = (*_ATTENTION, "qkv")
_PRODUCTS: tuple[Name, ...] = (*_QKV, "attended", "gate_up")


def named(x: jax.Array, name: Name) -> jax.Array:
    """x, known to the policies by a name."""
    return checkpoint_name(x, name)


def policy(remat: Remat) -> Any:
    """The policy of `jax.checkpoint` for every choice but "none"."""
    return _POLICIES[remat]


def _saving(names: tuple[Name, ...]) -> Any:
    is_named = jax.checkpoint_policies.save_only_these_names(*names)

    def is_saved(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
        if primitive.name in FLASH_PRIMITIVES:
            return True
        return is_named(primitive, *arguments, **parameters)

    return is_saved


_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "save_attention": _saving(_ATTENTION),
    "save_qkv_attention": _saving(_QKV),
    "save_products": _saving(_PRODUCTS),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
