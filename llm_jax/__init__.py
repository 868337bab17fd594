"""llm_jax: a language model's whole life in one small JAX codebase."""

__version__ = "0.1.0"
