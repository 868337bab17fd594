"""Which part of a config decides what comes out of a run, and its hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_jax.config import digest, flatten
from llm_jax.json_files import require_json

# What a resumed run may change: none of it decides which batches or updates come next.
FREE_TO_CHANGE = (
    "mesh",
    "step",
    "checkpoint",
    "metrics",
    "evaluation",
    "sample",
    "profile",
    "compilation_cache",
    "data.cache_dir",
    "pretraining.cache_dir",
)


def binding(config: dict[str, Any]) -> dict[str, Any]:
    """The leaves of a resolved config that bind a run, by dotted path."""
    return {
        key: value
        for key, value in flatten(config).items()
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)
    }


def binding_digest(workdir: Path) -> str:
    """The hash of what binds the run in a folder."""
    return digest(binding(require_json(workdir / "config.json")))
