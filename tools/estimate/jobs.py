"""What the commands of tools.estimate read in the same way: the config's model, and the chips."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from absl import flags

from llm_jax.config import build
from llm_jax.errors import UserError
from llm_jax.main import parse
from llm_jax.models.config import check_length
from llm_jax.scaling.planner import Job
from llm_jax.scaling.presets import Cluster, cluster_of, find_cluster
from llm_jax.trainers import find_stage
from llm_jax.trainers.base import RunConfig
from llm_jax.trainers.foundation import asked_model
from llm_jax.trainers.pretrain import PretrainConfig
from tools.bench.jax_worker import read_config
from tools.cli import require


def read_stage_config(values: flags.FlagValues, overrides: Sequence[str]) -> RunConfig:
    """The config of --config, of whatever stage.

    Raises:
      UserError: there is none.
    """
    require(values, "config")
    found, _ = parse(["tools.estimate", f"--config={values.config}", *overrides])
    return build(find_stage(found).config, found)


def read_job(values: flags.FlagValues, overrides: Sequence[str]) -> tuple[Job, PretrainConfig]:
    """The job of --config, with --length and --batch in place of those of its longest phase.

    Raises:
      UserError: no config, one of another stage, or a length past the model's positions.
    """
    require(values, "config")
    config = read_config(values.config, list(overrides))
    longest = max(config.phases, key=lambda phase: phase.length)
    length = values.length or longest.length
    batch = values.batch or max(1, longest.length * longest.batch // length)
    model = asked_model(config)
    check_length(model, length)
    model = dataclasses.replace(model, attention_backend="auto")
    return Job(model, length, batch, config.optimizer, config.loss.chunk), config


def read_cluster(chip: str | None, chips: str | None) -> Cluster:
    """The cluster of --chips=v5e-16, or of --chip=v5e --chips=16.

    Raises:
      UserError: neither, or one that does not exist.
    """
    if chips is not None and not chips.isdigit():
        return find_cluster(chips)
    if chip is None or chips is None:
        raise UserError("name the chips: --chips=v5e-16, or --chip=v5e --chips=16.")
    return cluster_of(chip, int(chips))
