"""What two runs are compared on: the documents or examples that both were measured on."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.evals.bootstrap import Sample

# A measure is Σ amounts / Σ sizes over units, which have the same names for every model.
Units = dict[str, tuple[float, float]]
Measures = dict[tuple[str, str], Units]  # by task and key, or TAG/KEY for a part of its examples

BITS_PER_BYTE, LOSS = "bits_per_byte", "loss"
LN_2 = math.log(2)
# Which choice of a multiple-choice example each accuracy asks for.
PICKS = {
    "picked": "accuracy",
    "picked_by_bytes": "accuracy_by_bytes",
    "picked_unconditional": "accuracy_unconditional",
}


def read_evaluation(path: Path, step: int, notes: list[str]) -> dict[str, Any]:
    """The evaluation.json of a run; {} where there is none, or one of another checkpoint.

    Its "data" is the hash of the run's documents, or the run itself where that is not known.

    Raises:
      UserError: it cannot be read.
    """
    from llm_jax.json_files import read_json
    from tools.evaluate import FILE, read_record

    file = path / FILE
    record = read_record(file)
    if record is None:
        return {}
    if record["step"] != step:
        notes.append(f"{file} is of checkpoint {record['step']}, not {step}: it is left out")
        return {}
    hashes = (read_json(path / "result.json") or {}).get("hashes", {})
    return {**record, "data": hashes.get("data", str(path))}


def of_evaluations(
    names: Sequence[str], records: Sequence[Mapping[str, Any]], notes: list[str]
) -> list[Measures]:
    """Of each run, the measures of the tasks that all have with the same settings, by example; and
    those of each tag's examples apart, where there are several tags.

    Runs of several tokenizers are left their bits per byte alone: nats over tokens, and what is
    read or answered in tokens, is not the same measure for both.
    """
    labels = set.intersection(*(set(record.get("tasks", {})) for record in records))
    one_tokenizer = len({record.get("tokenizer") for record in records}) == 1
    data = {record.get("data") for record in records}
    found: list[Measures] = [{} for _ in records]
    for label in sorted(labels):
        tasks = [record["tasks"][label] for record in records]
        failed = [f"{n} ({t['error']})" for n, t in zip(names, tasks, strict=True) if "error" in t]
        if failed:
            notes.append(f"the task {label} failed in {', '.join(failed)}: it is left out")
            continue
        if any(_identity(task) != _identity(tasks[0]) for task in tasks):
            notes.append(f"the task {label} has other settings in each run: it is left out")
            continue
        if _reads_what_was_held_out(tasks[0]) and len(data) > 1:
            notes.append(f"the task {label} reads what each run held out, and they differ in that")
            continue
        for measures, task in zip(found, tasks, strict=True):
            examples = task.get("examples", [])
            several_tags = len({example.get("tag") for example in examples}) > 1
            for example in examples:
                parts = ("", f"{example['tag']}/") if several_tags else ("",)
                for part, (key, *sums) in itertools.product(parts, _scores(example)):
                    if one_tokenizer or key == BITS_PER_BYTE:
                        units = measures.setdefault((label, part + key), {})
                        units[str(example["id"])] = sums[0], sums[1]
    return found


def measure(arguments: Sequence[str], documents: int, notes: list[str]) -> list[dict[str, Any]]:
    """Of each run the record that tools.evaluate makes of the documents it held out, read in
    windows of the shortest length that one of them was trained on.

    Args:
      documents: of each component at most.

    Raises:
      UserError: a run that held out no texts, or whose sources cannot be read any more.
    """
    import jax

    from llm_jax.compilation import use_compilation_cache
    from llm_jax.evals.run_subject import run_subject
    from llm_jax.evals.task import TaskTerm
    from llm_jax.evals.tasks import make_tasks
    from llm_jax.runs import load_run
    from llm_jax.stored import find
    from tools.evaluate import evaluate

    use_compilation_cache()
    every = [find(argument) for argument in arguments]
    length = min(min(s.meta.get("length", s.model.max_length), s.model.max_length) for s in every)
    term = TaskTerm("perplexity", settings={"documents": documents, "length": length})
    records = []
    for argument in arguments:  # one after the other, so that one at a time is in memory
        run = load_run(argument)
        with jax.set_mesh(run.mesh):
            records.append(evaluate(run, make_tasks((term,), run_subject(run, notes.append))))
    notes.append(f"held-out documents are read in windows of at most {length:,} tokens")
    return records


def paired(
    groups: Sequence[Sequence[Measures]], key: tuple[str, str], notes: list[str]
) -> list[Sample] | None:
    """A sample for each group of seeds, on the units that all runs have; None without any.

    A unit of which a model read other bytes than another is none that both have: a tokenizer that
    rewrites text, or a text that was cut off.
    """
    runs = [measures.get(key, {}) for group in groups for measures in group]
    common = sorted(set.intersection(*(set(units) for units in runs)))
    if not common:
        notes.append(f"{' '.join(key)}: the runs have no document or example in common")
        return None
    same = [name for name in common if len({units[name][1] for units in runs}) == 1]
    most = max(len(units) for units in runs)
    if len(same) < most:
        notes.append(f"{' '.join(key)}: {len(same):,} of {most:,} units are the same for all runs")
    if not same:
        return None
    return [
        Sample(
            np.array([[measures[key][name][0] for name in same] for measures in group]),
            np.array([[measures[key][name][1] for name in same] for measures in group], float),
        )
        for group in groups
    ]


def _identity(task: Mapping[str, Any]) -> str:
    return json.dumps([task.get("task"), task.get("settings")], sort_keys=True)


def _reads_what_was_held_out(task: Mapping[str, Any]) -> bool:
    """Whether its examples, whose names do not tell, are made of the run's own documents."""
    return task.get("settings", {}).get("source", "") is None


def _scores(example: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Key, amount and size of each measure that an example of tools.evaluate tells of."""
    if "nats" in example and example.get("bytes"):
        yield BITS_PER_BYTE, example["nats"] / LN_2, example["bytes"]
        if example.get("tokens"):
            yield LOSS, example["nats"], example["tokens"]
    if "correct" in example:
        yield "accuracy", float(example["correct"]), 1.0
    for picked, key in PICKS.items():
        if picked in example:
            yield key, float(example[picked] == example["answer"]), 1.0
    rewards = [reward for reward in example.get("rewards", []) if reward is not None]
    if rewards:
        yield "reward", float(np.mean(rewards)), 1.0
