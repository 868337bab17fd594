"""Checkpoints: the only file that imports orbax.

A checkpoint is a folder `checkpoints/STEP/` with four items, so that a later stage can read what it
needs and no more:
  params   the parameters: their average, where the optimiser keeps one
  train    step, optimiser state, randomness, and the parameters where `params` is an average
  data     the cursor of the data and of the phases (JSON)
  meta     model config, stage, lineage (JSON)
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint.checkpoint_managers import preservation_policy

from llm_jax.errors import UserError
from llm_jax.types import TrainState

FOLDER = "checkpoints"
ITEMS = ("params", "train", "data", "meta")
DAMAGED = ".damaged"
UNREAD = ocp.PLACEHOLDER  # in place of a shape: this array is there and is not to be read


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is written and which are kept."""

    every: int = 200  # steps; the last step of a phase and of the run are always saved
    keep_latest: int = 2
    keep_every: int | None = None  # steps whose multiples are kept for good

    def __post_init__(self) -> None:
        for name in ("every", "keep_latest", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"config.checkpoint.{name}={value} must be at least 1.")


class Checkpointer:
    """Writes and restores the checkpoints of one run directory, asynchronously and atomically."""

    def __init__(self, workdir: str | Path, config: CheckpointConfig):
        self._directory = Path(workdir).absolute() / FOLDER
        policies: list[Any] = [preservation_policy.LatestN(config.keep_latest)]
        if config.keep_every:
            policies.append(preservation_policy.EveryNSteps(config.keep_every))
        _hush()
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
            ),
        )

    def save(
        self, step: int, state: TrainState, params: Any, data: dict[str, Any], meta: dict[str, Any]
    ) -> None:
        """Starts writing a checkpoint; returns once the arrays may be overwritten.

        `params` is what later stages and tools read: `state.params` or the average of them.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                train=ocp.args.StandardSave(_train_item(state, params is not state.params)),
                data=ocp.args.JsonSave(data),
                meta=ocp.args.JsonSave(meta),
            ),
            force=True,
        )

    def restore(
        self, abstract: TrainState, averaged: bool, warn: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest readable state and its data cursor, or None when nothing was saved.

        `averaged` says that the `params` item holds an average, as it did in `save`. `abstract`
        holds jax.ShapeDtypeStructs with the shardings of the current mesh, which may differ from
        the mesh that wrote. A checkpoint that cannot be read is set aside under another name,
        reported by `warn`, and the one before it is tried.

        Raises:
          UserError: checkpoints exist and none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        reasons = []
        for step in steps:
            try:
                return self._restore(step, abstract, averaged)
            except Exception as error:  # orbax and tensorstore raise many types for damaged files
                reasons.append(f"{step}: {_first_line(error)}")
                if step != steps[-1]:
                    warn(
                        f"checkpoint {step} cannot be read ({_first_line(error)}); trying an older"
                    )
                    self._set_aside(step)
        if reasons:
            raise UserError(
                f"no checkpoint in {self._directory} can be read ({'; '.join(reasons)}): "
                f"start again in another --workdir, or delete the folder."
            )
        return None

    def wait(self) -> None:
        """Blocks until the checkpoint being written is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def _restore(
        self, step: int, abstract: TrainState, averaged: bool
    ) -> tuple[TrainState, dict[str, Any]]:
        items: dict[str, Any] = {
            "train": ocp.args.StandardRestore(_train_item(abstract, averaged)),
            "data": ocp.args.JsonRestore(),
        }
        if not averaged:
            items["params"] = ocp.args.StandardRestore(abstract.params)
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        train = restored["train"]
        params = train["params"] if averaged else restored["params"]
        rng = jax.device_put(jax.random.wrap_key_data(train["rng"]), abstract.rng.sharding)
        state = TrainState(train["step"], params, train["opt_state"], rng)
        return state, restored["data"]

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            aside = self._directory / f"{step}{DAMAGED}"
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time at the same step
            os.rename(self._directory / str(step), aside)
        self._manager.reload()


def latest_step(run: str | Path) -> int | None:
    """The newest checkpoint of a run directory, None where there is none."""
    steps = _steps(Path(run))
    return steps[-1] if steps else None


def locate(init_from: str) -> tuple[Path, int]:
    """The run directory and step that `DIR` or `DIR@STEP` names.

    Raises:
      UserError: no run directory there, or no such step in it.
    """
    name, wanted = init_from, ""
    # A folder's own name may hold an "@", too.
    if "@" in name and not (Path(name) / "config.json").exists():
        name, wanted = init_from.rsplit("@", 1)
    run = Path(name)
    if not (run / "config.json").exists():
        raise UserError(f"{name} is no run directory: it has no config.json (in {init_from!r}).")
    steps = _steps(run)
    if not steps:
        raise UserError(f"{name} holds no checkpoint yet: run its stage first.")
    if not wanted:
        return run, steps[-1]
    if not wanted.isdigit() or int(wanted) not in steps:
        raise UserError(
            f"{name} has no checkpoint {wanted!r}; it has {', '.join(map(str, steps))}."
        )
    return run, int(wanted)


def read_meta(run: str | Path, step: int) -> dict[str, Any]:
    """The meta item of one checkpoint: model config, stage, lineage.

    Raises:
      UserError: the checkpoint cannot be read.
    """
    folder = _step_folder(run, step) / "meta"
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            return checkpointer.restore(folder, args=ocp.args.JsonRestore())
    except Exception as error:
        raise UserError(f"{folder} cannot be read: {_first_line(error)}") from error


def newest_meta(run: str | Path) -> tuple[int, dict[str, Any]] | None:
    """Step and meta of the newest checkpoint whose meta can be read; None without checkpoints.

    Raises:
      UserError: checkpoints exist and the meta of none can be read.
    """
    problem = None
    for step in reversed(_steps(Path(run))):
        try:
            return step, read_meta(run, step)
        except UserError as error:
            problem = problem or error
    if problem is not None:
        raise problem
    return None


def read_params(run: str | Path, step: int, abstract: Any) -> Any:
    """The parameters of one checkpoint, straight into the shardings of `abstract`.

    Leaves of `abstract` that are `UNREAD` stay so.

    Raises:
      UserError: the checkpoint cannot be read or has other parameters than `abstract`.
    """
    folder = _step_folder(run, step) / "params"
    try:
        arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(
                folder, args=ocp.args.PyTreeRestore(abstract, restore_args=arguments)
            )
    except Exception as error:
        raise UserError(
            f"the parameters in {folder} cannot be read: {_first_line(error)}"
        ) from error


def find_damage(run: str | Path, step: int) -> str | None:
    """Reads every item of one checkpoint that is there; says why one cannot be read, or None."""
    _hush()
    for item in ITEMS:
        folder = _step_folder(run, step) / item
        if not folder.exists():
            continue
        try:
            if item in ("data", "meta"):
                with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
                    checkpointer.restore(folder, args=ocp.args.JsonRestore())
            else:
                _read_one_by_one(folder)
        except Exception as error:  # as in `Checkpointer.restore`
            return f"{item} cannot be read ({_first_line(error)})"
    return None


def _read_one_by_one(folder: Path) -> None:
    """Reads every array of an item, as numpy: the devices that wrote it need not be here."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        leaves, structure = jax.tree.flatten(checkpointer.metadata(folder).item_metadata.tree)
        for place in range(len(leaves)):
            wanted: list[Any] = [UNREAD] * len(leaves)
            wanted[place] = np.zeros(leaves[place].shape, leaves[place].dtype)
            arguments = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(leaves)
            checkpointer.restore(
                folder,
                args=ocp.args.PyTreeRestore(
                    jax.tree.unflatten(structure, wanted),
                    restore_args=jax.tree.unflatten(structure, arguments),
                ),
            )


def write_weights(run: str | Path, step: int, params: Any, meta: dict[str, Any]) -> None:
    """Writes a checkpoint that holds no more than what a later stage reads; none can resume it."""
    with ocp.CheckpointManager(Path(run).absolute() / FOLDER) as manager:
        manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta)
            ),
        )


@dataclasses.dataclass(frozen=True)
class Deferred:
    """A float32 array that is made part by part while it is written, and is never in memory whole.

    shape: of the array. part: of its parts, which are cut on a grid; the last ones may be smaller.
    make: gives one part as a numpy array, from its range (begin, end) along each dimension.
    """

    shape: tuple[int, ...]
    part: tuple[int, ...]
    make: Callable[[tuple[tuple[int, int], ...]], np.ndarray]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def boxes(self) -> Iterator[tuple[tuple[int, int], ...]]:
        """The ranges of all parts."""
        grid = (range(0, n, p) for n, p in zip(self.shape, self.part, strict=True))
        for begin in itertools.product(*grid):
            place = zip(begin, self.part, self.shape, strict=True)
            yield tuple((b, min(b + p, n)) for b, p, n in place)


class _DeferredHandler(ocp.type_handlers.ArrayHandler):
    """Writes Deferred arrays one part after the other, as orbax writes the shards of an array."""

    async def serialize(
        self,
        values: Sequence[Any],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list[Any]:
        for value, info, arg in zip(values, infos, args or [None] * len(values), strict=True):
            await info.await_path_creation()
            spec = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=True,
                global_shape=value.shape,
                local_shape=value.part,
                dtype=value.dtype,
                process_index=0,
                arg=arg,
            )
            store = await tensorstore.open(
                tensorstore.Spec(spec), create=True, open=True, context=info.ts_context
            )
            for box in value.boxes():
                await store[tuple(slice(*ends) for ends in box)].write(
                    value.make(box), can_reference_source_data_indefinitely=True
                )
        return []


def write_streamed(run: str | Path, step: int, params: Any, meta: dict[str, Any]) -> None:
    """Writes what `write_weights` writes, of a tree whose leaves are `Deferred` or arrays.

    The host holds a few parts at a time, and devices hold none.

    Raises:
      UserError: one of several processes.
    """
    if jax.process_count() > 1:
        raise UserError("checkpoints are converted by one process: start it alone.")
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (Deferred, _DeferredHandler())
    )
    handlers = {
        "params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        "meta": ocp.JsonCheckpointHandler(),
    }
    with ocp.CheckpointManager(
        Path(run).absolute() / FOLDER,
        item_handlers=handlers,
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
    ) as manager:
        manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(params), meta=ocp.args.JsonSave(meta)
            ),
        )


def _hush() -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every file at INFO
    # Of a damaged checkpoint's many files one error is raised; asyncio would print the others.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _step_folder(run: str | Path, step: int) -> Path:
    return Path(run).absolute() / FOLDER / str(step)


def _steps(run: Path) -> list[int]:
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


def _train_item(state: TrainState, with_params: bool) -> dict[str, Any]:
    """What resuming needs beside the parameters; typed keys are stored as their raw words."""
    if isinstance(state.rng, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, state.rng)
        rng: Any = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=state.rng.sharding)
    else:
        rng = jax.random.key_data(state.rng)
    item = {"step": state.step, "opt_state": state.opt_state, "rng": rng}
    return item | ({"params": state.params} if with_params else {})


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
