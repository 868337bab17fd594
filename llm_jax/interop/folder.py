"""A Hugging Face folder: what it says of its model, and its weights in our parameter tree."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from llm_jax.config import resolved
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.errors import UserError
from llm_jax.interop import tensors
from llm_jax.interop.families import Family, family_of, text_config
from llm_jax.interop.mapping import leaves_of
from llm_jax.interop.pieces import Leaf
from llm_jax.interop.safetensors_files import TensorFolder
from llm_jax.interop.tokenizer_files import has_tokenizer, read_template, read_tokenizer
from llm_jax.models.config import ModelConfig
from llm_jax.models.heads import REWARD
from llm_jax.weights import abstract, shapes

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
CLASSIFIER = "ForSequenceClassification"


@dataclasses.dataclass(frozen=True)
class PublishedFolder:
    """A folder with config.json and safetensors.

    config: its config.json; of a model with several parts the text model's. heads: the heads that
    it has beside the output projection. model: with layers stacked or not, as it was opened.
    """

    path: Path
    config: Mapping[str, Any]
    family: Family
    heads: tuple[str, ...]
    model: ModelConfig

    @functools.cached_property
    def tensors(self) -> TensorFolder:
        return TensorFolder(self.path)

    @functools.cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """All parameters and their tensors, checked against the files.

        Raises:
          UserError: a tensor is missing, left over or of the wrong shape.
        """
        leaves = leaves_of(self.model, self.heads, self.family, self._prefix())
        # Tied files may hold the table twice; classifiers may hold the head that they replaced.
        ignored = [*self.family.ignored]
        if self.model.tie_embeddings or self.heads:
            ignored.append(r"(.*\.)?(lm_head|embed_out)\.weight")
        tensors.check(self.tensors, leaves, ignored)
        return leaves

    @property
    def dtype(self) -> str:
        """The dtype of its tensors where they have the same, otherwise float32."""
        found = {str(self.tensors.dtype(p.tensor)) for leaf in self.leaves for p in leaf.pieces}
        return found.pop() if len(found) == 1 else "float32"

    def abstract(self, mesh: Mesh) -> Any:
        """Shapes and shardings of the parameters."""
        return abstract(mesh, shapes(self.model, self.heads))

    def load(self, mesh: Mesh) -> Any:
        """The parameters, float32, straight into their shards.

        Raises:
          UserError: see `leaves`.
        """
        return tensors.load(self.tensors, self.leaves, self.abstract(mesh))

    def tokenizer(self) -> Tokenizer:
        """
        Raises:
          UserError: the folder holds none, a damaged one, or that of another model.
        """
        if not has_tokenizer(self.path):
            raise UserError(
                f"{self.path} holds no tokenizer: put the files of its release there "
                "(tokenizer.json or tokenizer.model)."
            )
        tokenizer = read_tokenizer(self.path)
        rows = self.model.vocab_size or 0
        # Special tokens alone may lie past the table, as those of images do in a text model.
        past = set(range(rows, tokenizer.vocab_size)) - set(tokenizer.specials.values())
        ends = (tokenizer.bos_id, tokenizer.pad_id, *tokenizer.eos_ids)
        if past or max(ends) >= rows:
            raise UserError(
                f"the tokenizer in {self.path} has {tokenizer.vocab_size} tokens and the model's "
                f"table {rows} rows: they do not belong together."
            )
        return tokenizer

    def meta(self) -> dict[str, Any]:
        """What a checkpoint with these weights says of itself."""
        template = read_template(self.path)
        return {
            "stage": "import",
            "model": resolved(self.model),
            "length": self.model.max_length,
            "lineage": [],
            "heads": list(self.heads),
            "published": {
                "folder": str(self.path.absolute()),
                "config": dict(self.config),
                "dtype": self.dtype,
                "generation": _read_json(self.path / GENERATION_FILE, optional=True),
            },
            **({} if template is None else {"template": template.describe()}),
        }

    def _prefix(self) -> str:
        """What stands before the tensors' names here; nothing where the bare model was saved."""
        (embedding,) = self.family.table["embedding"]
        name = embedding.split(":")[0]
        for prefix in (*self.family.prefixes, ""):
            if f"{prefix}{name}" in self.tensors.tensors:
                return prefix
        return self.family.prefixes[0]


def is_published(path: str | Path) -> bool:
    """Whether a folder is a Hugging Face model's and not a run directory."""
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        return False
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(config, dict) and "model_type" in config


def open_folder(path: str | Path, scan_layers: bool = False) -> PublishedFolder:
    """Reads config.json; the weights are not touched yet.

    Args:
      scan_layers: whether the parameters of layers are to be stacked.

    Raises:
      UserError: no such folder, or a model that is not understood.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is no folder: name one with config.json and safetensors files.")
    whole = _read_json(path / CONFIG_FILE)
    if "model_type" not in whole:
        raise UserError(
            f"{path} is no Hugging Face folder: its config.json has no model_type. (A run is named "
            "by --workdir, --base or config.init_from.)"
        )
    config = {**text_config(whole)}
    if config.get("quantization_config") or whole.get("quantization_config"):
        raise UserError(f"{path} holds quantised weights: take the model's unquantised release.")
    family = family_of(config)
    model = dataclasses.replace(family.read(config), scan_layers=scan_layers)
    heads = _heads(path, whole)
    if heads:  # no output projection is there, so none is to be untied
        model = dataclasses.replace(model, tie_embeddings=True)
    return PublishedFolder(path, config, family, heads, model)


def _heads(path: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    architecture = (config.get("architectures") or [""])[0]
    if not architecture.endswith(CLASSIFIER):
        return ()
    labels = config.get("num_labels", len(config.get("id2label") or "ab"))
    if labels != 1:
        raise UserError(
            f"{path} is a classifier of {labels} labels: only one of a single label is a reward "
            "model."
        )
    return (REWARD,)


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: name a folder with it.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: download it again.")
    return content
