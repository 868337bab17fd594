"""One measure for the policies of several stages: rewards of their answers to held-out prompts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jax.binding import binding_digest
from llm_jax.config import digest, resolved
from llm_jax.data.prompts import PromptDataConfig
from llm_jax.evals.generation import GenerationConfig, make_generation
from llm_jax.evals.subject import Subject
from llm_jax.models import LanguageModel
from llm_jax.rl.rewards import RewardTerm
from llm_jax.stored import find


@dataclasses.dataclass(frozen=True)
class YardstickConfig:
    """How the stages of a recipe are measured, and which of them."""

    stages: tuple[str, ...] = ()
    data: PromptDataConfig = PromptDataConfig()  # its held-out prompts
    rewards: tuple[RewardTerm, ...] = (RewardTerm("exact_match"),)
    rows: int = 256  # prompts at most
    max_new_tokens: int = 64
    temperature: float = 0.0  # 0: greedy
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Of one stage.

    identity: a hash of run and yardstick, by which a repeated measurement is told. reward, stderr:
    the mean over held-out prompts. metrics: whatever else the answers show.
    """

    stage: str
    identity: str
    reward: float
    stderr: float
    metrics: dict[str, float]

    def describe(self) -> str:
        return f"reward {self.reward:.3f} ± {self.stderr:.3f}"


def measure(
    stage: str,
    identity: str,
    run: Path,
    config: YardstickConfig,
    mesh: Mesh,
    log: Callable[[str], None],
) -> Measurement:
    """The mean reward of a run's answers.

    Raises:
      UserError: a run, prompts or rewards that cannot be read.
    """
    stored = find(str(run))
    weights, _ = stored.read_merged(mesh)
    subject = Subject(
        name=stored.name,
        model=LanguageModel(dataclasses.replace(stored.model, lora=None)),
        tokenizer=stored.tokenizer(),
        template=stored.template,
        mesh=mesh,
        length=stored.meta["length"],
        log=log,
    )
    settings = GenerationConfig(
        data=config.data,
        rewards=config.rewards,
        passes=None,
        rows=config.rows,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        slots=None,
        max_reward_failures=config.rows,
        seed=config.seed,
    )
    metrics = make_generation(settings, subject).run(weights).metrics
    metrics.pop("reward_std")
    reward, stderr = metrics.pop("reward"), metrics.pop("reward_stderr", 0.0)
    return Measurement(stage, identity, reward, stderr, metrics)


class Measurements:
    """What the stages of a recipe have measured, in their order, kept in a file of JSON lines."""

    def __init__(self, path: Path):
        self._path = path
        self._taken: list[Measurement] = []
        self._before: list[dict[str, Any]] = []  # of an earlier start
        if path.exists():
            self._before = [json.loads(line) for line in path.read_text("utf-8").splitlines()]

    @property
    def best(self) -> Measurement | None:
        """The first of those with the highest reward; None before there is any."""
        return max(self._taken, key=lambda taken: taken.reward, default=None)

    def take(
        self,
        stage: str,
        run: Path,
        config: YardstickConfig,
        mesh: Mesh,
        log: Callable[[str], None],
    ) -> str:
        """Measures a stage, unless the same was measured at an earlier start; a line about it.

        Raises:
          UserError: see `measure`.
        """
        identity = digest([binding_digest(run), resolved(config)])
        known = next((line for line in self._before if line["identity"] == identity), None)
        if known is not None:
            self._taken.append(Measurement(**known))
        else:
            with jax.set_mesh(mesh):
                self._taken.append(measure(stage, identity, run, config, mesh, log))
        if jax.process_index() == 0:
            lines = [json.dumps(dataclasses.asdict(taken)) + "\n" for taken in self._taken]
            self._path.write_text("".join(lines), encoding="utf-8")
        last, gain = self._taken[-1], self._gains()[-1]
        assert self.best is not None
        return f"yardstick: {stage} {last.describe()}{gain}; best so far: {self.best.stage}"

    def describe(self) -> str:
        """A Markdown table; nothing where nothing is measured."""
        if not self._taken:
            return ""
        lines = ["", "| stage | reward on held-out prompts | over the round before |",
                 "| --- | --- | --- |"]  # fmt: skip
        for taken, gain in zip(self._taken, self._gains(), strict=True):
            lines.append(f"| {taken.stage} | {taken.describe()} | {gain.strip(' ()')} |")
        return "\n".join(lines) + "\n"

    def _gains(self) -> list[str]:
        """What each has gained over the one before, in words."""
        pairs = zip(self._taken, self._taken[1:], strict=False)
        return ["", *(f" ({b.reward - a.reward:+.3f} over {a.stage})" for a, b in pairs)]
