"""Where compiled programs are kept from one process to the next."""

from __future__ import annotations

import os

import jax

from llm_jax.data.store import default_cache_dir


def use_compilation_cache(setting: str | None = None) -> None:
    """Switches on the compile cache of this process, before anything is compiled.

    Args:
      setting: a folder, or "off"; None = $JAX_COMPILATION_CACHE_DIR, or compiled/ in the cache
        folder of llm_jax.
    """
    if setting == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = setting or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_compilation_cache_dir", folder or str(default_cache_dir() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
