"""Builds what a config names, calls the loop, and keeps the run directory's contract."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jax import checkpoint
from llm_jax.binding import binding
from llm_jax.compilation import use_compilation_cache
from llm_jax.config import build, digest, resolved
from llm_jax.distributed import ask_all, check_equal, wait_for_all
from llm_jax.errors import UserError, disk_errors
from llm_jax.json_files import read_json, require_json, write_json
from llm_jax.mesh import describe_hardware, make_mesh
from llm_jax.metrics import RunLog
from llm_jax.models.heads import REWARD
from llm_jax.recipe import RECIPE, run_recipe
from llm_jax.train import Outcome, train
from llm_jax.trainers import find_stage
from llm_jax.trainers.base import RunConfig, Trainer

DISK_MEND = (
    "Mend that, or name another --workdir; the same command resumes from the last checkpoint."
)


def run(config: Any, workdir: str | Path) -> int:
    """Trains what `config` (an ml_collections ConfigDict) describes in the folder `workdir`.

    Returns:
      The exit status: 0 finished, 128 + signal number when a signal stopped it.

    Raises:
      UserError: bad input; nothing that existed is harmed.
    """
    if config.get("trainer", "") == RECIPE:
        return run_recipe(config, Path(workdir), run)
    stage = find_stage(config, [RECIPE])
    run_config = build(stage.config, config)
    workdir = Path(workdir)
    if _finished(workdir, run_config):
        if jax.process_index() == 0:
            print(f"{workdir} is finished already: nothing to do (see {workdir / 'result.json'}).")
        return 0

    use_compilation_cache(run_config.compilation_cache)
    mesh = make_mesh(run_config.mesh)
    log = RunLog(workdir, run_config.metrics, resolved(run_config))
    with disk_errors(workdir, DISK_MEND), jax.set_mesh(mesh), log:
        trainer = stage.build(run_config, mesh, workdir, log.message)
        # Also keeps process 0 from writing into a folder that another has not looked at yet.
        hashes = {"tokenizer": trainer.tokenizer.fingerprint, "data": trainer.data_fingerprint}
        check_equal({f"the hash of the {name}": hash_ for name, hash_ in hashes.items()})
        if jax.process_index() == 0:
            _write_contract(workdir, run_config, trainer)
        _check_shared(workdir)
        outcome = train(trainer, run_config, mesh, workdir, log)
        if jax.process_index() == 0:
            _write_result(workdir, run_config, trainer, outcome, mesh)
        log.message(_farewell(workdir, trainer.heads, outcome))
    return 0 if outcome.signal is None else 128 + outcome.signal


def _finished(workdir: Path, config: RunConfig) -> bool:
    """Whether the run has ended; refuses a folder that belongs to something else."""
    if not workdir.exists():
        return False
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file: name a folder.")
    if not (workdir / "config.json").exists():
        if any(not entry.name.startswith(".") for entry in workdir.iterdir()):
            raise UserError(
                f"--workdir={workdir} holds files but no run: name a new or empty folder."
            )
        return False
    if checkpoint.latest_step(workdir) is None:
        return False  # it ended before its first checkpoint, so nothing binds the config
    before = binding(require_json(workdir / "config.json"))
    now = binding(resolved(config))
    changed = [key for key in before | now if before.get(key) != now.get(key)]
    if changed:
        key = changed[0]
        more = f" (it is one of {len(changed)} such keys)" if len(changed) > 1 else ""
        raise UserError(
            f"{workdir} was made with another config: {key} was {before.get(key)!r} and is "
            f"{now.get(key)!r} now{more}. Use another --workdir, or the old values to resume."
        )
    result = read_json(workdir / "result.json")
    return result is not None and result["status"] == "finished"


def _write_contract(workdir: Path, config: RunConfig, trainer: Trainer) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    # The config comes first: a folder of other files without one is taken for someone else's.
    write_json(workdir / "config.json", resolved(config))
    if checkpoint.latest_step(workdir) is None:  # else the tokenizer was read from there
        trainer.tokenizer.save(workdir / "tokenizer")


def _check_shared(workdir: Path) -> None:
    """
    Raises:
      UserError: a process does not see what process 0 has written; in all processes.
    """
    wait_for_all("the contract is written")
    sees = ask_all((workdir / "config.json").exists())
    if not all(sees):
        raise UserError(
            f"--workdir={workdir} is another folder for process {sees.index(False)} than for "
            "process 0: name one that all hosts share, such as on NFS or a mounted bucket."
        )


def _write_result(
    workdir: Path, config: RunConfig, trainer: Trainer, outcome: Outcome, mesh: Mesh
) -> None:
    measured = {
        "tokens_per_second": outcome.tokens_per_second,
        "mfu": outcome.mfu,
        "skipped_steps": outcome.skipped_steps,
        "failed_evaluations": outcome.failed_evaluations or None,
    }
    result = {
        "status": "finished" if outcome.signal is None else "interrupted",
        "stage": config.trainer,
        "step": outcome.step,
        "tokens": outcome.tokens,
        "seconds": round(outcome.seconds, 3),
        **{key: value for key, value in measured.items() if value is not None},
        "hardware": describe_hardware(mesh),
        "metrics": outcome.metrics,
        "parent": config.init_from_hf or config.init_from,
        "lineage": list(trainer.lineage),
        "hashes": {
            "config": digest(binding(resolved(config))),
            "data": trainer.data_fingerprint,
            "tokenizer": trainer.tokenizer.fingerprint,
        },
    }
    write_json(workdir / "result.json", result)


def _farewell(workdir: Path, heads: Sequence[str], outcome: Outcome) -> str:
    minutes, seconds = divmod(round(outcome.seconds), 60)
    total = f"{outcome.step:,} steps, {outcome.tokens:,} tokens in {minutes} min {seconds} s"
    if outcome.signal is not None:
        return f"stopped at {total}; a checkpoint is written: the same command resumes."
    lines = [f"finished: {total}"]
    if outcome.sample:
        lines.append(f"sample: {outcome.sample!r}")
    lines.append(f"curves:   tensorboard --logdir {workdir}")
    if REWARD in heads:
        lines.append(
            f"score:    python -m tools.score --workdir={workdir} --input=... --output=..."
        )
    else:
        lines.append(f"generate: python -m tools.generate --workdir={workdir} --prompt='...'")
    return "\n".join(lines)
