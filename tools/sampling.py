"""What the tools that generate have in common: flags, the models that speak."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from absl import flags

from llm_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llm_jax.data.templates import ChatTemplate
    from llm_jax.data.tokenizers import Tokenizer
    from llm_jax.generation.decoding import Decodable
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


def define_speaker_flags(values: flags.FlagValues) -> None:
    """Adds the flags of `define_sampling_flags`, and those of proxy tuning."""
    define_sampling_flags(values)
    flags.DEFINE_string(
        "expert", None, "proxy tuning: a run whose logits, --strength times, are added to those of "
        "--workdir", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "anti_expert", None, "a run whose logits, --strength times, are subtracted: what the "
        "expert was before it was tuned", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float(
        "strength", None, "of expert and anti-expert; absent = 1", flag_values=values
    )


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


@dataclasses.dataclass(frozen=True)
class Speaker:
    """What writes: the model of a run, or those of several as one.

    name: for notes. voice: the run that lends tokenizer and template: that of --workdir, or its
    expert where that of --workdir has no template.
    """

    name: str
    model: Decodable
    params: Any
    voice: LoadedRun

    @property
    def mesh(self) -> Mesh:
        """Computations enter it by `with jax.set_mesh(mesh)`."""
        return self.voice.mesh

    @property
    def tokenizer(self) -> Tokenizer:
        return self.voice.tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """
        Raises:
          UserError: see `run_template`.
        """
        return run_template(self.voice)


def load_speaker(values: flags.FlagValues) -> Speaker:
    """The run of --workdir, steered by --expert and --anti_expert where they are given.

    Raises:
      UserError: a run that cannot be read, that is a reward model, or that has another tokenizer
        than the rest; a strength without either, or not finite.
    """
    from llm_jax.generation.proxy import Part, proxy_tuned
    from llm_jax.runs import load_run

    strength = _strength(values)
    names = (values.workdir, values.expert, values.anti_expert)
    runs = {name: load_run(name) for name in dict.fromkeys(names) if name}
    base = runs[values.workdir]
    expert, anti_expert = runs.get(values.expert), runs.get(values.anti_expert)
    for run in runs.values():
        check_generates(run)
        _check_tokenizer(run, base)
    voice = base if expert is None or base.stored.template is not None else expert
    if expert is None and anti_expert is None:
        return Speaker(base.stored.name, base.model, base.params, voice)
    parts = {name: Part(run.model, run.params) for name, run in runs.items()}
    model, params = proxy_tuned(
        parts[values.workdir], parts.get(values.expert), parts.get(values.anti_expert), strength
    )
    name = base.stored.name
    if expert is not None:
        name += f" {strength:+g} * {expert.stored.name}"
    if anti_expert is not None:
        name += f" {-strength:+g} * {anti_expert.stored.name}"
    return Speaker(name, model, params, voice)


def _strength(values: flags.FlagValues) -> float:
    if values.strength is None:
        return 1.0
    if not (values.expert or values.anti_expert):
        raise UserError(
            f"--strength={values.strength:g} has nothing to weigh: give --expert, --anti_expert or "
            "both."
        )
    if not math.isfinite(values.strength):
        raise UserError(f"--strength={values.strength} must be a finite number.")
    return values.strength


def _check_tokenizer(run: LoadedRun, base: LoadedRun) -> None:
    """Raises UserError where a token of one run means something else to the other.

    Which tokens end a text or a turn may differ, as between a published model and its tuned kin.
    """
    own, other = run.tokenizer, base.tokenizer
    if (own.kind, own.files()) != (other.kind, other.files()):
        raise UserError(
            f"{run.path} has another tokenizer than {base.path}, whose logits are those of other "
            "tokens: steer with runs of the same tokenizer."
        )


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
