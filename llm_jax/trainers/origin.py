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
from llm_jax.config import build
from llm_jax.errors import UserError
from llm_jax.interop.folder import is_published
from llm_jax.models import ModelConfig
from llm_jax.models.heads import REWARD
from llm_jax.stored import Base, Stored, at, read_base
from llm_jax.weights import init_trained, init_weights, quantized, without_heads


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a run inherits: from its own past, from the stage before it, or from a published model.

    is_own: whether it is the run's own checkpoint. lineage: the stages before this one, oldest
    first.
    """

    stored: Stored
    is_own: bool
    lineage: tuple[dict[str, Any], ...]

    @staticmethod
    def find(config: Any, workdir: Path, heads: tuple[str, ...]) -> Origin | None:
        """Decides in this order: (1) the run's own newest checkpoint, (2) the published folder
        `config.init_from_hf`, (3) the run `config.init_from`, (4) None: from scratch.

        Raises:
          UserError: no such run or folder, or a reward model that the stage has no use for.
        """
        own = checkpoint.newest_meta(workdir)
        if own is not None:
            return Origin(Stored(workdir, *own), is_own=True, lineage=tuple(own[1]["lineage"]))
        if config.init_from_hf is not None:
            if not is_published(config.init_from_hf):
                raise UserError(
                    f"config.init_from_hf={config.init_from_hf!r} is no Hugging Face folder: it "
                    "has no config.json with a model_type. A run is named by config.init_from."
                )
            stored = at(config.init_from_hf, 0, config.model.scan_layers)
        elif config.init_from is not None:
            if is_published(config.init_from):
                raise UserError(
                    f"{config.init_from} is a Hugging Face folder: name it by config.init_from_hf."
                )
            stored = at(*checkpoint.locate(config.init_from))
        else:
            return None
        # A critic's head is of no use to other stages; a reward model is no language model.
        if REWARD in stored.heads and REWARD not in heads:
            raise UserError(
                f"{stored.path} is a model with {REWARD}, and stage {config.trainer!r} has no use "
                "for that: start from the language model that it was made from."
            )
        return Origin(stored, is_own=False, lineage=stored.lineage)

    @property
    def meta(self) -> dict[str, Any]:
        return self.stored.meta


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
            whole, _ = origin.stored.read_merged(mesh)
            return {**without_heads(whole), **_only(whole, heads)}

        return Weights(init, functools.partial(load_inherited, inherit, init, config.seed), None)
    _check_adapters(config, origin)
    assert origin is not None
    if origin.is_own:
        base = build(Base, origin.meta["base"], "meta.base")
        frozen, inherited = read_base(base, mesh, origin.stored.path, model), {}
    else:
        whole, identity = origin.stored.read_merged(mesh)
        inherited = _only(whole, heads)
        stored = origin.stored
        base = Base(str(stored.path), stored.step, identity, config.quantize_base)
        frozen = quantized(without_heads(whole), config.quantize_base)

    def make(rng: jax.Array, base: Any) -> Any:
        return init_trained(model, heads, rng, base=base)

    # The base goes in as an argument: a compiled function would hold what it closes over.
    load = functools.partial(load_inherited, lambda: inherited, make, config.seed, base=frozen)
    return Weights(functools.partial(make, base=frozen), load, frozen, base)


def _check_adapters(config: Any, origin: Origin | None) -> None:
    if origin is None:
        raise UserError(
            "config.model.lora adapts a trained model: name its run by config.init_from or its "
            "folder by config.init_from_hf, or leave config.model.lora out."
        )
    if config.optimizer.name == "muon":
        raise UserError(
            "config.optimizer.name='muon' orthogonalises the updates of kernels, and adapters "
            "have none: use 'adamw'."
        )


def _only(weights: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: weights[name] for name in names if name in weights}


def load_inherited(
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
