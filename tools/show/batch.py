"""Shows rows of the very batch that the run of a config trains on at a step.

    python -m tools.show batch --config=configs/STAGE.py[:ARG] [--step=0] [--config.a.b=v ...]
    python -m tools.show batch --config=configs/STAGE.py --row=2        one row, place by place

The stage is built and its own source is asked, on one device: a batch is the same on every mesh.
Every segment (a document, or the part of one that is in the row) has a colour, and tokens that the
loss does not count are dim; without colours those that it counts stand in ⟦⟧. A stage that samples
shows what the model that it starts from samples.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from llm_jax.console import align
from llm_jax.errors import UserError
from tools.show.text import make_console, print_tokens

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from rich.console import Console

    from llm_jax.data.phases import Phase
    from llm_jax.data.tokenizers import Tokenizer
    from llm_jax.trainers.base import Trainer
    from llm_jax.types import Batch

COLOURS = ("cyan", "magenta", "yellow", "blue", "green")


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "the run's config", flag_values=values)
    flags.DEFINE_integer("step", 0, "of the run, from 0 on", flag_values=values)
    flags.DEFINE_integer("rows", 3, "rows to show as text", flag_values=values)
    flags.DEFINE_integer("row", None, "show this row alone, place by place", flag_values=values)
    return values


def main(values: flags.FlagValues, overrides: Sequence[str] = ()) -> None:
    if not values.config:
        raise UserError("--config is required, for example --config=configs/pretrain.py.")
    if values.step < 0 or values.rows < 0:
        raise UserError(f"--step={values.step} and --rows={values.rows} must not be negative.")
    from llm_jax.main import parse

    config, _ = parse(["tools.show", f"--config={values.config}", *overrides])
    show(config, values.step, values.rows, values.row)


def show(config: Any, step: int = 0, rows: int = 3, row: int | None = None) -> None:
    """Prints the first `rows` rows of the batch of a step as text, or one row place by place.

    Args:
      config: of a stage, an ml_collections ConfigDict.
      step: from 0 on. row: the one to show, from 0 on.

    Raises:
      UserError: see `make_batch`; no such row.
    """
    trainer, phase, batch = make_batch(config, step)
    found = sequences_of(batch)
    if row is not None and not 0 <= row < len(found):
        raise UserError(f"--row={row}: the batch has the rows 0 to {len(found) - 1}.")
    print(
        f"batch of step {step}, in phase {phase.index + 1} of {len(trainer.phases)}: "
        f"{len(found)} rows of length {phase.length}"
    )
    print(f"together: {_count([s.batch for sequences in found for s in sequences])}")
    if any(earlier.gate is not None for earlier in trainer.phases[: phase.index]):
        print("as planned: where the gate of an earlier phase holds, this phase begins later")
    console = make_console()
    numbers = range(min(rows, len(found))) if row is None else [row]
    for number, sequence in ((n, s) for n in numbers for s in found[n]):
        print(f"\nrow {number}{sequence.title}: {_count([sequence.batch])}")
        if row is None:
            _print_text(console, sequence, trainer.tokenizer)
        else:
            print("\n".join(_places(sequence, trainer.tokenizer)))


@dataclasses.dataclass(frozen=True)
class ShownSequence:
    """A row of tokens. batch: with arrays [time]. title: what tells it from others of its row of
    the batch. more: what else is known of each target, by name, arrays [time]. packed: whether the
    last place of a segment has a target, too."""

    batch: Batch
    title: str = ""
    more: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    packed: bool = True


def make_batch(config: Any, step: int) -> tuple[Trainer, Phase, Any]:
    """The stage of a config (an ml_collections ConfigDict), the phase of a step as planned, and the
    batch of that step, in numpy arrays.

    Raises:
      UserError: a config that does not fit, a recipe, a step past the end, or one whose batch is
        sampled by a model that only training makes.
    """
    import jax

    from llm_jax.compilation import use_compilation_cache
    from llm_jax.config import build
    from llm_jax.mesh import MeshConfig, make_mesh
    from llm_jax.recipe import RECIPE
    from llm_jax.trainers import find_stage

    if config.get("trainer", None) == RECIPE:
        raise UserError("the config is a recipe, of several stages: name the config of one stage.")
    stage = find_stage(config)
    settings = dataclasses.replace(build(stage.config, config), mesh=MeshConfig())
    use_compilation_cache(settings.compilation_cache)
    mesh = make_mesh(settings.mesh, jax.devices()[:1])
    # A folder that no run is in: what is shown is what a run begins with.
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        trainer = stage.build(settings, mesh, Path(folder) / "run", _note)
        phase, first_step = _phase_at(trainer.phases, step)
        params = _sampling_params(trainer, mesh, step)
        trainer.source.start(phase, first_step)
        return trainer, phase, jax.device_get(trainer.source.next(params, step))


def _note(line: str) -> None:
    print(line, file=sys.stderr)


def _phase_at(phases: Sequence[Phase], step: int) -> tuple[Phase, int]:
    """The phase of a step, and the phase's first step."""
    ends = list(itertools.accumulate(phase.steps for phase in phases))
    for phase, end in zip(phases, ends, strict=True):
        if step < end:
            return phase, end - phase.steps
    raise UserError(f"--step={step}: the run has the steps 0 to {ends[-1] - 1}, as planned.")


def _sampling_params(trainer: Trainer, mesh: Mesh, step: int) -> Any:
    """The parameters that the first step samples with; None where nothing is sampled."""
    import jax

    from llm_jax import weights
    from llm_jax.trainers.rounds import OnPolicySource
    from llm_jax.types import join

    if not isinstance(trainer.source, OnPolicySource):
        return None
    if step:
        raise UserError(
            f"--step={step}: this stage trains on what its model samples, and the model of a later "
            "step is known to the run alone: leave --step out."
        )
    assert trainer.load_params is not None  # stages that sample improve a model that is there
    boxed = jax.eval_shape(trainer.init_params, jax.random.key(0))
    return join(trainer.load_params(weights.abstract(mesh, boxed)), trainer.frozen)


def sequences_of(batch: Any) -> list[list[ShownSequence]]:
    """The sequences of each row of a batch of any kind: one, or the responses of a comparison."""
    from llm_jax.types import Batch, DistillationBatch, PreferenceBatch, RolloutBatch

    if isinstance(batch, Batch):
        return [[ShownSequence(row)] for row in _rows(batch)]
    if isinstance(batch, DistillationBatch):
        likeliest = {"teacher's choice": batch.likeliest[..., 0]}
        return [[ShownSequence(r, "", _row_of(likeliest, i))] for i, r in _numbered(batch.rows)]
    if isinstance(batch, RolloutBatch):
        known = {"log p when sampled": batch.old_logprobs, "advantage": batch.advantages}
        return [
            [ShownSequence(r, "", _row_of(known, i), packed=False)]
            for i, r in _numbered(batch.sequences)
        ]
    assert isinstance(batch, PreferenceBatch)
    return [
        [
            ShownSequence(response, f", response {k}, score {batch.scores[row][k]:g}", packed=False)
            for k, response in enumerate(_rows(responses))
            if np.any(response.segment_ids)
        ]
        for row, responses in _numbered(batch.responses)
    ]


def _row_of(arrays: Mapping[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
    return {name: array[row] for name, array in arrays.items()}


def _rows(batch: Batch) -> Iterator[Batch]:
    return (row for _, row in _numbered(batch))


def _numbered(batch: Batch) -> Iterator[tuple[int, Batch]]:
    """The parts of a batch along its first dimension."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    for row in range(len(batch.tokens)):
        yield row, type(batch)(**_row_of(fields, row))


def _count(rows: Sequence[Batch]) -> str:
    places = sum(row.tokens.size for row in rows)
    padding = sum(int(np.sum(row.segment_ids == 0)) for row in rows)
    counted = sum(int(np.sum(row.loss_weights > 0)) for row in rows)
    segments = sum(len(list(_segments(row))) for row in rows)
    weights = np.unique(np.concatenate([row.loss_weights[row.loss_weights > 0] for row in rows]))
    text = (
        f"{places:,} places, {segments} segment{'s' * (segments != 1)}, "
        f"{padding:,} padding ({padding / places:.1%}), "
        f"{counted:,} targets counted ({counted / places:.1%})"
    )
    if np.any(weights != 1):
        text += f" with weights {weights[0]:g} to {weights[-1]:g}"
    return text


def _segments(row: Batch) -> Iterator[slice]:
    """The places of each segment of a row, padding left out."""
    starts = [0, *(np.flatnonzero(np.diff(row.segment_ids)) + 1), row.segment_ids.size]
    for begin, end in itertools.pairwise(starts):
        if row.segment_ids[begin]:
            yield slice(int(begin), int(end))


def _print_text(console: Console, sequence: ShownSequence, tokenizer: Tokenizer) -> None:
    """Each segment under its number: its first token, then its targets."""
    row = sequence.batch
    for number, places in enumerate(_segments(row)):
        positions, counted = row.positions[places], row.loss_weights[places] > 0
        print(
            f"  segment {row.segment_ids[places.start]}, positions {positions[0]} to "
            f"{positions[-1]}, {int(counted.sum())} of {len(counted)} targets counted:"
        )
        targets = slice(places.start, places.stop if sequence.packed else places.stop - 1)
        tokens = [int(row.tokens[places.start]), *row.targets[targets].tolist()]
        trained = [False, *(row.loss_weights[targets] > 0).tolist()]
        colour = COLOURS[number % len(COLOURS)]
        print_tokens(console, tokens, trained, tokenizer, colour, f"dim {colour}")


def _places(sequence: ShownSequence, tokenizer: Tokenizer) -> list[str]:
    """A line for each place of a row that is no padding."""
    row, names = sequence.batch, list(sequence.more)

    def shown(token: int) -> str:
        return f"{token} {tokenizer.decode([token], skip_special=False)!r}"

    def known(name: str, place: Any) -> str:
        value = sequence.more[name][place]
        return shown(value) if np.issubdtype(type(value), np.integer) else f"{value:.3f}"

    lines = [["place", "segment", "position", "token", "target", "weight", *names]]
    for place in np.flatnonzero(row.segment_ids):
        numbers = (place, row.segment_ids[place], row.positions[place])
        tokens = (row.tokens[place], row.targets[place])
        lines.append([
            *map(str, numbers), *map(shown, tokens), f"{row.loss_weights[place]:g}",
            *(known(name, place) for name in names),
        ])  # fmt: skip
    return align(lines, right=(0, 1, 2, 5))
