"""What a run's folder says of it: the stage, its data and phases, its lineage, its checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_jax import checkpoint
from llm_jax.console import align, clock_time
from llm_jax.errors import UserError
from llm_jax.json_files import read_json
from llm_jax.models import ModelConfig
from llm_jax.models.size import parameter_count
from llm_jax.stored import Stored

CONTRACT = ("config.json", "tokenizer", "checkpoints", "metrics.jsonl", "result.json")
WRITING = ".orbax-checkpoint-tmp"  # in the names of folders that are not renamed yet


def describe(stored: Stored) -> list[str]:
    """Everything but checkpoints and parameters, a line or a few for each."""
    config = None if stored.published else _read(stored.path / "config.json")
    result = None if stored.published else _read(stored.path / "result.json")
    facts = [
        (stored.name, _status(stored, result)),
        ("model", _model(stored.model)),
        ("heads", ", ".join(stored.heads)),
        ("trained at", f"length {stored.meta.get('length', 'unknown')}"),
        *(("phases" if not n else "", line) for n, line in enumerate(_phases(config or {}))),
        ("tokenizer", _tokenizer(stored)),
        ("template", _template(stored)),
        ("adapters of", _base(stored)),
    ]
    lines = align([fact for fact in facts if fact[1]])
    return [*lines, "", "lineage", *align(list(_lineage(stored, result)))]


def _read(path: Path) -> dict[str, Any] | None:
    """What a file of a run holds; None where it is not there or cannot be read."""
    try:
        return read_json(path)
    except UserError:
        return None


def _status(stored: Stored, result: dict[str, Any] | None) -> str:
    stage = stored.meta["stage"]
    if stored.published is not None:
        return f"a published {stored.published.config['model_type']} model"
    if result is None:
        damaged = (stored.path / "result.json").exists()
        reason = "result.json cannot be read" if damaged else "no result.json"
        return f"{stage}, not finished: {reason}; its command resumes at the newest checkpoint"
    return (
        f"{stage}, {result['status']} after {result['step']:,} steps, {result['tokens']:,} tokens, "
        f"{clock_time(result['seconds'])}"
    )


def _model(model: ModelConfig) -> str:
    parts = [f"{parameter_count(model):,} parameters", f"{model.num_layers} layers"]
    parts += [f"embed {model.embed_dim}", f"{model.num_heads} heads of {model.resolved_head_dim}"]
    if model.kv_heads != model.num_heads:
        parts.append(f"{model.kv_heads} key/value heads")
    parts.append(f"{model.mlp} {model.mlp_dim}")
    if model.moe is not None:
        parts.append(f"{model.moe.num_experts} experts, {model.moe.experts_per_token} a token")
    parts += [f"vocabulary {model.vocab_size:,}", f"positions to {model.max_length:,}"]
    if model.lora is not None:
        parts.append(f"adapters of rank {model.lora.rank}")
    return ", ".join(parts)


def _phases(config: dict[str, Any]) -> Iterator[str]:
    phases = config.get("phases", ())
    for number, phase in enumerate(phases, start=1):
        parts = [f"length {phase['length']}", f"batch {phase['batch']}"]
        parts += [f"{phase[name]:,} {name}" for name in ("steps", "tokens") if phase.get(name)]
        if phase.get("rope_theta"):
            parts.append(f"RoPE base {phase['rope_theta']:g}")
        if phase.get("rope_scaling") and phase.get("rope_factor"):
            parts.append(f"{phase['rope_scaling']} scaling by {phase['rope_factor']:g}")
        if phase.get("weights"):
            parts.append("mixture " + ", ".join(f"{k} {v:g}" for k, v in phase["weights"].items()))
        if phase.get("gate"):
            parts.append("gated")
        yield f"{number} of {len(phases)}: {', '.join(parts)}"


def _tokenizer(stored: Stored) -> str:
    if not stored.has_tokenizer:
        return "missing"
    try:
        tokenizer = stored.tokenizer()
    except UserError as error:
        return f"cannot be read: {error}"
    return f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens, hash {tokenizer.fingerprint}"


def _template(stored: Stored) -> str:
    description = stored.meta.get("template")
    return "" if description is None else str(description.get("name", "of its own"))


def _base(stored: Stored) -> str:
    base = stored.meta.get("base")
    if base is None:
        return ""
    held = base.get("quantized") or "float32"
    return f"{base['run']}@{base['step']}, weights {base['fingerprint']}, held in {held}"


def _lineage(stored: Stored, result: dict[str, Any] | None) -> Iterator[Sequence[str]]:
    """A row a stage, oldest first; hashes of data and tokenizer where its folder is still there."""
    yield "  stage", "run", "step", "config", "data", "tokenizer"
    for entry in stored.lineage:
        own = entry["run"] == str(stored.path)
        found = result if own else _read(Path(entry["run"]) / "result.json")
        hashes = (found or {}).get("hashes", {})
        gone = "" if Path(entry["run"]).exists() else " (not there)"
        yield (
            f"  {entry['stage']}", f"{entry['run']}{gone}", str(entry["step"]), entry["config"],
            hashes.get("data", "-"), hashes.get("tokenizer", "-"),
        )  # fmt: skip


def describe_checkpoints(workdir: str, verify: bool) -> list[str]:
    """A line for each checkpoint on disk.

    Raises:
      UserError: no run, or one without any checkpoint: it says what is there and what is missing.
    """
    name = workdir
    if "@" in name and not (Path(name) / "config.json").exists():
        name = workdir.rsplit("@", 1)[0]
    run = Path(name)
    if not (run / "config.json").exists():
        raise UserError(f"{name} is no run directory: it has no config.json.")
    found = list(checkpoints(run, verify))
    if not any(entry.step is not None for entry in found):
        there = [part for part in CONTRACT if (run / part).exists()]
        missing = [part for part in CONTRACT if part not in there and part != "checkpoints"]
        unfinished = f", {len(found)} of them unfinished or damaged" if found else ""
        raise UserError(
            f"{name} holds {', '.join(there)}, and no checkpoint that can be loaded{unfinished}; "
            f"missing: {', '.join(['a checkpoint', *missing])}. Start its command again."
        )
    rows = [(f"  {entry.name}", f"{entry.bytes / 1e6:,.1f} MB", entry.state) for entry in found]
    return ["checkpoints", *align(rows, right=(1,)), ""]


@dataclasses.dataclass(frozen=True)
class OnDisk:
    """A folder among the checkpoints. step: None where it is none that can be loaded. state: what
    it holds, or what is wrong with it."""

    name: str
    step: int | None
    bytes: int
    state: str


def checkpoints(run: Path, verify: bool) -> Iterator[OnDisk]:
    """All that lies among a run's checkpoints, in the order of their steps."""
    folder = run / checkpoint.FOLDER
    entries = [entry for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    for entry in sorted(entries, key=_order):
        size = sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())
        step = int(entry.name) if entry.name.isdigit() else None
        yield OnDisk(entry.name, step, size, _state(run, entry, verify))


def _order(entry: Path) -> tuple[int, str]:
    number = entry.name.partition(".")[0]
    return (int(number) if number.isdigit() else 0, entry.name)


def _state(run: Path, entry: Path, verify: bool) -> str:
    if WRITING in entry.name:
        return "unfinished: being written, or cut off while it was"
    if entry.name.endswith(checkpoint.DAMAGED):
        return "damaged, set aside by a resumed run"
    if not entry.name.isdigit():
        return "no checkpoint"
    missing = [item for item in checkpoint.ITEMS if not (entry / item).is_dir()]
    if {"params", "meta"} & set(missing):
        return f"damaged: {' and '.join(missing)} missing"
    state = "weights alone, which no run resumes" if missing else "complete"
    if verify:
        problem = checkpoint.find_damage(run, int(entry.name))
        return f"damaged: {problem}" if problem else f"{state}, every array was read"
    return f"{state}; --verify reads its arrays"
