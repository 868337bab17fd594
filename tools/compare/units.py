"""What two runs are compared on: the documents or examples that both were measured on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_jax.errors import UserError
from llm_jax.evals.bootstrap import Sample

if TYPE_CHECKING:
    from llm_jax.runs import LoadedRun

# A measure is Σ amounts / Σ sizes over units, which have the same names for every model.
Units = dict[str, tuple[float, float]]
Measures = dict[tuple[str, str], Units]  # by task, or component of held-out documents, and key

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
    file = path / "evaluation.json"
    if not file.exists():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        record["tasks"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is no record of tools.evaluate ({error}): make it anew, or delete it."
        ) from error
    if record.get("step") != step:
        notes.append(f"{file} is of checkpoint {record.get('step')}, not {step}: it is left out")
        return {}
    result = path / "result.json"
    hashes = json.loads(result.read_text("utf-8")).get("hashes", {}) if result.exists() else {}
    return {**record, "data": hashes.get("data", str(path))}


def of_evaluations(
    names: Sequence[str], records: Sequence[Mapping[str, Any]], notes: list[str]
) -> list[Measures]:
    """Of each run, the measures of the tasks that all have with the same settings, by example.

    Runs of several tokenizers are left their bits per byte alone: nats over tokens, and what is
    read or answered in tokens, is not the same measure for both.
    """
    labels = set.intersection(*(set(record.get("tasks", {})) for record in records))
    one_tokenizer = len({record.get("tokenizer") for record in records}) == 1
    data = {record.get("data") for record in records}
    found: list[Measures] = [{} for _ in records]
    for label in sorted(labels):
        tasks = [record["tasks"][label] for record in records]
        failed = [name for name, task in zip(names, tasks, strict=True) if "error" in task]
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
            for example in task.get("examples", []):
                for key, amount, size in _scores(example):
                    if one_tokenizer or key == BITS_PER_BYTE:
                        measures.setdefault((label, key), {})[str(example["id"])] = amount, size
    return found


def of_documents(
    runs: Sequence[LoadedRun], names: Sequence[str], most: int, notes: list[str]
) -> list[Measures]:
    """Of each run, its measures on the held-out documents that all have, by document.

    Args:
      most: documents of each component; those of the smallest hash are taken.

    Raises:
      UserError: a run that held out no texts, or no document that all have.
    """
    from llm_jax.evals.documents import held_out, measure

    documents = [held_out(run) for run in runs]
    one_tokenizer = len({run.tokenizer.fingerprint for run in runs}) == 1
    length = min(int(run.meta.get("length", run.model.config.max_length)) for run in runs)
    found: list[Measures] = [{} for _ in runs]
    for component in dict.fromkeys(name for held in documents for name in held):
        held = [of_run[component] for of_run in documents if component in of_run]
        if len(held) < len(runs):
            notes.append(f"not all runs held out {component}: it is left out")
            continue
        common = sorted(set.intersection(*(set(each.indices) for each in held)))
        for name, each in zip(names, held, strict=True):
            if len(common) < len(each.indices):
                notes.append(
                    f"of the {len(each.indices):,} documents of {component} that {name} held out, "
                    f"all runs have {len(common):,}: these are compared"
                )
        if not common:
            continue
        if len(common) > most:
            notes.append(f"of {len(common):,} documents of {component}, {most:,} are measured")
        for run, each, measures in zip(runs, held, found, strict=True):
            sums = measure(run, each, common[:most], length)
            measures[component, BITS_PER_BYTE] = {
                name: (one.nats / LN_2, one.bytes) for name, one in sums.items()
            }
            if one_tokenizer:
                measures[component, LOSS] = {
                    name: (one.nats, one.tokens) for name, one in sums.items()
                }
    if not any(found):
        raise UserError(
            f"{' and '.join(names)} have no held-out document in common: compare runs that were "
            "trained on the same data, or measure them by tools.evaluate on one source."
        )
    notes.append(f"documents are read in pieces of at most {length:,} tokens")
    return found


def paired(
    groups: Sequence[Sequence[Measures]], key: tuple[str, str], notes: list[str]
) -> list[Sample] | None:
    """A sample for each group of seeds, on the units that all runs have; None without any.

    A unit of which a model read other bytes than another is none that both have: a tokenizer that
    rewrites text, or a text that was cut off.
    """
    runs = [measures.get(key, {}) for group in groups for measures in group]
    common = sorted(set.intersection(*(set(units) for units in runs)))
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
