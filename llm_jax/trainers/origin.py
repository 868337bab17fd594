"""Where a stage starts: the run it inherits from, and the weights that come of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jax import checkpoint, sharding
from llm_jax.binding import binding_digest
from llm_jax.config import build
from llm_jax.errors import UserError
from llm_jax.models import ModelConfig
from llm_jax.trainers.base import RunConfig
from llm_jax.weights import (
    Base,
    init_trained,
    init_weights,
    quantized,
    read_base,
    read_merged,
    without_heads,
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a run inherits: from its own past, or from the stage before it.

    is_own: whether it is the run's own checkpoint. step: of that checkpoint. lineage: the stages
    before this one, oldest first.
    """

    run: Path
    step: int
    meta: dict[str, Any]
    is_own: bool
    lineage: tuple[dict[str, Any], ...]

    @staticmethod
    def find(config: RunConfig, workdir: Path, heads: tuple[str, ...]) -> Origin | None:
        """The run's own newest checkpoint, else `config.init_from`, else None.

        Raises:
          UserError: no such run, or one with a head that is not among `heads`.
        """
        own = checkpoint.newest_meta(workdir)
        if own is not None:
            return Origin(workdir, *own, is_own=True, lineage=tuple(own[1]["lineage"]))
        if config.init_from is None:
            return None
        run, step = checkpoint.locate(config.init_from)
        meta = checkpoint.read_meta(run, step)
        lost = set(meta.get("heads", ())) - set(heads)
        if lost:
            raise UserError(
                f"{run} is a model with {', '.join(sorted(lost))}, and stage {config.trainer!r} "
                "has no use for that: start from the run that it was made from."
            )
        before = {
            "stage": meta["stage"],
            "run": str(run),
            "step": step,
            "config": binding_digest(run),
        }
        return Origin(run, step, meta, is_own=False, lineage=(*meta["lineage"], before))

    @property
    def name(self) -> str:
        return f"{self.run}@{self.step}"

    @property
    def model(self) -> ModelConfig:
        return build(ModelConfig, self.meta["model"], "meta.model")


@dataclasses.dataclass(frozen=True)
class Weights:
    """What is trained and what is not; see `Trainer` for the first three.

    base: what adapters belong to, None without adapters.
    """

    init: Callable[[jax.Array], Any]
    load: Callable[[Any], Any] | None
    frozen: Any
    base: Base | None = None


def decide_weights(
    config: Any, mesh: Mesh, origin: Origin | None, model: ModelConfig, heads: tuple[str, ...]
) -> Weights:
    """What is trained, what is frozen, and where both come from.

    Raises:
      UserError: a config that does not fit, or an origin that cannot be read.
    """
    if model.lora is None:
        if config.quantize_base is not None:
            raise UserError("config.quantize_base needs config.model.lora: only a base is frozen.")
        init = functools.partial(init_weights, model, heads)
        if origin is None or origin.is_own:
            return Weights(init, None, None)

        def inherit() -> Any:
            whole, _ = read_merged(origin.run, origin.step, mesh)
            return {**without_heads(whole), **_only(whole, heads)}

        return Weights(init, functools.partial(_load, inherit, init, config.seed), None)
    _check_adapters(config, origin)
    assert origin is not None
    if origin.is_own:
        base = build(Base, origin.meta["base"], "meta.base")
        frozen, inherited = read_base(base, mesh, beside=origin.run), {}
    else:
        whole, identity = read_merged(origin.run, origin.step, mesh)
        inherited = _only(whole, heads)
        base = Base(str(origin.run), origin.step, identity, config.quantize_base)
        frozen = quantized(without_heads(whole), config.quantize_base)

    def make(rng: jax.Array, base: Any) -> Any:
        return init_trained(model, heads, rng, base=base)

    # The base goes in as an argument: a compiled function would hold what it closes over.
    load = functools.partial(_load, lambda: inherited, make, config.seed, base=frozen)
    return Weights(functools.partial(make, base=frozen), load, frozen, base)


def _check_adapters(config: Any, origin: Origin | None) -> None:
    if origin is None:
        raise UserError(
            "config.model.lora adapts a trained model: name its run by config.init_from, or leave "
            "config.model.lora out."
        )
    if config.optimizer.name == "muon":
        raise UserError(
            "config.optimizer.name='muon' orthogonalises the updates of kernels, and adapters "
            "have none: use 'adamw'."
        )


def _only(weights: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: weights[name] for name in names if name in weights}


def _load(
    inherit: Callable[[], Any],
    init: Callable[..., Any],
    seed: int,
    abstract: Any,
    **arguments: Any,
) -> Any:
    """What is inherited, with what is new beside it; checked against `abstract`, strictly.

    `init(rng, **arguments)` makes what is new.

    Raises:
      UserError: the inherited parameters are others than the model's.
    """
    params = inherit()
    new = tuple(sorted(abstract.keys() - params.keys()))
    if new:
        make = jax.jit(
            lambda rng, arguments: _only(sharding.unbox(init(rng, **arguments)), new),
            out_shardings=jax.tree.map(lambda x: x.sharding, _only(abstract, new)),
        )
        params = {**params, **make(jax.random.key(seed), arguments)}
    wanted, found = (
        {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(t)}
        for t in (abstract, params)
    )
    if wanted != found:
        name = next(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        raise UserError(
            f"the inherited parameters do not fit the model: {name} is {found.get(name)}, and "
            f"{wanted.get(name)} is wanted."
        )
    return params
