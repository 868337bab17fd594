"""Continues a prompt with a trained model.

    python -m tools.generate --workdir=RUN[@STEP] --prompt=TEXT [--temperature=0.8 --top_p=0.95 ...]

Prints the prompt with its continuation on stdout, and nothing else there; notes go to stderr.
"""

from __future__ import annotations

import sys

from absl import flags

from llm_jax.errors import UserError
from tools.cli import run_tool


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "run directory; RUN@STEP for an older checkpoint", flag_values=values
    )
    flags.DEFINE_string(
        "prompt", "", "text to continue; empty = the start of a document", flag_values=values
    )
    flags.DEFINE_integer("max_new_tokens", 128, "tokens to add at most", flag_values=values)
    # None leaves the sampler's own default standing.
    flags.DEFINE_float(
        "temperature", None, "logits are divided by it; 0 = greedy; absent = 1", flag_values=values
    )
    flags.DEFINE_integer("top_k", None, "keep the k most probable tokens", flag_values=values)
    flags.DEFINE_float(
        "top_p", None, "keep the fewest tokens of this total probability", flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "of the sampling", flag_values=values)
    flags.DEFINE_integer("num_samples", 1, "continuations to make", flag_values=values)
    return values


def main(values: flags.FlagValues) -> None:
    _check(values)
    import jax

    from llm_jax.generation.generate import sample_texts
    from llm_jax.generation.sampler import SamplerConfig
    from llm_jax.runs import load_run

    given = {name: values[name].value for name in ("temperature", "top_k", "top_p")}
    sampler = SamplerConfig(**{name: value for name, value in given.items() if value is not None})
    run = load_run(values.workdir)
    print(f"{run.path}, checkpoint {run.step}", file=sys.stderr)
    with jax.set_mesh(run.mesh):
        texts = sample_texts(
            run.model,
            run.params,
            run.tokenizer,
            [values.prompt] * values.num_samples,
            max_new_tokens=values.max_new_tokens,
            sampler=sampler,
            seed=values.seed,
        )
    for number, text in enumerate(texts, start=1):
        if len(texts) > 1:
            print(f"sample {number} of {len(texts)}:", file=sys.stderr, flush=True)
        print(text, flush=True)


def _check(values: flags.FlagValues) -> None:
    """Refuses what can be refused before anything is loaded."""
    if not values.workdir:
        raise UserError("--workdir is required, for example --workdir=runs/pretrain.")
    if values.num_samples < 1:
        raise UserError(f"--num_samples={values.num_samples} must be at least 1.")
    try:
        values.prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"--prompt is not UTF-8: {error.reason} at {error.start}.") from error


if __name__ == "__main__":
    sys.exit(run_tool(main, define_flags(), __doc__ or ""))
