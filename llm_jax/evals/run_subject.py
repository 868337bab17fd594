"""A run on disk as the subject of tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llm_jax.data.store import TokenStore
from llm_jax.errors import UserError
from llm_jax.evals.held_out import has_texts, held_out_stores
from llm_jax.evals.subject import BATCH, Subject
from llm_jax.json_files import read_json
from llm_jax.models.heads import REWARD
from llm_jax.runs import LoadedRun


def run_subject(run: LoadedRun, log: Callable[[str], None], batch: int = BATCH) -> Subject:
    """The subject whose parameters are `run.params`.

    Raises:
      UserError: the run has no tokenizer, or is a reward model.
    """
    if REWARD in run.stored.heads:
        raise UserError(f"{run.path} is a reward model: it scores texts, see tools.score.")
    return Subject(
        name=run.stored.name,
        model=run.model,
        tokenizer=run.tokenizer,
        template=run.stored.template,
        mesh=run.mesh,
        length=run.meta.get("length", run.model.max_length),
        log=log,
        held_out=_held_out(run),
        batch=batch,
    )


def _held_out(run: LoadedRun) -> Callable[[], Mapping[str, TokenStore]] | None:
    """What the run's config says that it held out; None of a stage without texts."""
    if run.stored.published is not None:
        return None
    config = read_json(run.path / "config.json")
    if config is None or not has_texts(config):
        return None
    return lambda: held_out_stores(config, run.tokenizer, run.stored.template)
