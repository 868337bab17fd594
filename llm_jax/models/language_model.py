"""`LanguageModel`: the transformer as pure functions, the face it shows to everything outside."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.models.attention import choose_backend
from llm_jax.models.cache import KVCache, init_cache
from llm_jax.models.config import ModelConfig
from llm_jax.models.context import check_context, context_ways, lay_out, to_natural
from llm_jax.models.moe import Routing
from llm_jax.models.product import product, turned
from llm_jax.models.transformer import INTERMEDIATES, Transformer


class LanguageModel:
    """The transformer without flax: pure functions of a plain tree of float32 parameters.

    Raises:
      UserError: no vocabulary size, or an attention backend that cannot do what the config asks.
    """

    def __init__(self, config: ModelConfig, platform: str | None = None):
        """`platform` ("cpu", "gpu", "tpu") is what it will run on; None = JAX's default."""
        if config.vocab_size is None:
            raise UserError("model.vocab_size is not set: give it, or take the tokenizer's.")
        self.config = config
        self.backend = choose_backend(config, platform or jax.default_backend())
        self._module = Transformer(config, self.backend)

    @property
    def vocab_size(self) -> int:
        assert self.config.vocab_size is not None
        return self.config.vocab_size

    @property
    def max_length(self) -> int:
        """Tokens of a row at most, prompt and continuation together."""
        return self.config.max_length

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache with room for `length` tokens a row."""
        return init_cache(self.config, batch, length)

    def init(self, rng: jax.Array) -> Any:
        """Random parameters in `sharding.Named` boxes that hold their logical axes."""
        # One token fills no mesh, on which the kernels of other backends insist; parameters depend
        # on none.
        module = Transformer(self.config, "einsum")
        return module.init(rng, jnp.zeros((1, 1), jnp.int32), None, None, None)["params"]

    def apply(
        self,
        params: Any,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        rng: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Hidden states after the final norm, [batch, time, embed] in the computation dtype.

        Args:
          tokens: int32 [batch, time], all below the vocabulary size.
          positions: int32 [batch, time]; None counts on from the cache's lengths, or from 0.
          segment_ids: int32 [batch, time], 0 for padding; None = one segment a row.
          rng: switches dropout, and the noise of NEFTune, on.
          cache: keys and values of earlier tokens, which these follow; see `KVCache`. Prefill and
            decoding are the same call with many tokens or one.
        """
        hidden, cache, _ = self.apply_with_routing(
            params, tokens, positions, segment_ids, rng=rng, cache=cache
        )
        return hidden, cache

    def apply_with_routing(
        self,
        params: Any,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        rng: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None, Routing | None]:
        """`apply`, and which experts the tokens took, summed over layers; None without experts."""
        rngs = None if rng is None else {"dropout": rng}
        ways = 1 if cache is not None else context_ways(tokens.shape[1], self.backend)
        if ways > 1:
            check_context(self.config, self.backend, jax.sharding.get_abstract_mesh())
            tokens, positions, segment_ids = lay_out(tokens, positions, segment_ids, ways)
        result: Any = self._module.apply(
            {"params": params}, tokens, positions, segment_ids, cache, rngs=rngs
        )
        hidden, cache, routing = result
        return (to_natural(hidden, ways) if ways > 1 else hidden), cache, routing

    def attention_entropy(
        self,
        params: Any,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """The entropy of every query's attention weights, float32 [layers, batch, heads, time] in
        nats; see `attention.attention_entropy`. The arguments are those of `apply`.

        Raises:
          ValueError: a mesh with stages or a context axis, where no device sees whole rows.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty and mesh.shape["stage"] * mesh.shape["context"] > 1:
            raise ValueError("attention entropy is not computed over stages or a context axis")
        _, collected = self._module.apply(
            {"params": params}, tokens, positions, segment_ids, None, mutable=[INTERMEDIATES]
        )
        config, found = self.config, collected[INTERMEDIATES]
        if not config.scan_layers:
            layers = [found[f"layer_{i}"] for i in range(config.num_layers)]
            return jnp.stack([layer["attention"]["entropy"][0] for layer in layers])
        places = [found["layers"][f"block_{i}"] for i in range(len(config.windows))]
        by_place = jnp.stack([place["attention"]["entropy"][0] for place in places], axis=1)
        return by_place.reshape(config.num_layers, *by_place.shape[2:])

    def output_kernel(self, params: Any) -> jax.Array:
        """The output projection, float32 [embed, vocab], as gradients over many chunks add up."""
        tied = self.config.tie_embeddings
        kernel = turned(params["embedding"]) if tied else params["output"]
        return kernel.astype(jnp.float32)

    def project(self, hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        """Logits float32 [..., vocab] of hidden states [..., embed] under an output kernel."""
        logits = product(hidden, kernel, self.config.dtype)
        if self.config.width_multiplier != 1:
            logits /= self.config.width_multiplier
        cap = self.config.logits_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        """Logits float32 [batch, time, vocab] of the hidden states that `apply` returns."""
        return self.project(hidden, self.output_kernel(params))
