"""What the tools that generate have in common: the sampler's flags, the template, a closed pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import flags

from llm_jax.errors import UserError

if TYPE_CHECKING:
    from llm_jax.data.templates import ChatTemplate
    from llm_jax.generation.sampler import SamplerConfig
    from llm_jax.runs import LoadedRun

_SAMPLER_FLAGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def define_sampling_flags(values: flags.FlagValues) -> None:
    """Adds --workdir, --seed and a flag for each setting of the sampler."""
    flags.DEFINE_string(
        "workdir", None, "run directory; RUN@STEP for an older checkpoint", flag_values=values
    )
    # None leaves the sampler's own default standing.
    flags.DEFINE_float(
        "temperature", None, "logits are divided by it; 0 = greedy; absent = 1", flag_values=values
    )
    flags.DEFINE_integer("top_k", None, "keep the k most probable tokens", flag_values=values)
    flags.DEFINE_float(
        "top_p", None, "keep the fewest tokens of this total probability", flag_values=values
    )
    flags.DEFINE_float(
        "min_p", None, "keep tokens at least this many times as probable as the most probable one",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float(
        "repetition_penalty", None, "above 1: tokens that are there already become less probable",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("seed", 0, "of the sampling", flag_values=values)


def make_sampler(values: flags.FlagValues) -> SamplerConfig:
    """The sampler that the flags describe.

    Raises:
      UserError: a setting out of its range.
    """
    from llm_jax.generation.sampler import SamplerConfig

    given = {name: values[name].value for name in _SAMPLER_FLAGS}
    return SamplerConfig(**{name: value for name, value in given.items() if value is not None})


def check_text(flag: str, text: str) -> None:
    """Raises UserError for the bytes of a command line that form no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"--{flag} is not UTF-8: {error.reason} at {error.start}.") from error


def check_generates(run: LoadedRun) -> None:
    """Raises UserError for a reward model, which scores texts and writes none."""
    from llm_jax.models.heads import REWARD

    if REWARD in run.meta.get("heads", ()):
        raise UserError(f"{run.path} is a reward model: it scores texts, see tools.score.")


def run_template(run: LoadedRun) -> ChatTemplate:
    """The chat template that a run was trained with.

    Raises:
      UserError: it was trained without one, on plain text.
    """
    check_generates(run)
    template = run.stored.template
    if template is None:
        raise UserError(
            f"{run.path} is a pre-trained run, without a chat template: fine-tune it with "
            "configs/sft.py, or continue a text with tools.generate."
        )
    return template


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """Ends the block without a word when the reader of stdout has gone, as `| head` does."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
