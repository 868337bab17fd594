"""Runs without their training: models that are random, or known token by token."""

import jax
import numpy as np
import pytest

from llm_jax.config import resolved
from llm_jax.data.examples import Message
from llm_jax.data.templates import TEMPLATES
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.runs import LoadedRun
from llm_jax.sharding import unbox
from llm_jax.stored import Stored
from llm_jax.synthesis.responders import RunResponder

MODEL = LanguageModel(
    ModelConfig(vocab_size=264, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, max_length=512)
)


@pytest.fixture(scope="session")
def random_weights():
    """Parameters that make logits far from uniform."""
    rng = np.random.default_rng(0)
    shapes = unbox(jax.eval_shape(MODEL.init, jax.random.key(0)))
    return jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="session")
def unigram(random_weights):
    """`unigram(logits)`: parameters of a model that draws every token with these logits, by id,
    whatever stands before it; other tokens hardly ever."""

    def make(logits):
        # All embeddings lie in one direction, so the normalised hidden state is always the same.
        weights = jax.tree.map(np.zeros_like, random_weights)
        weights["final_norm"]["scale"][:] = 3
        weights["embedding"][:, 0] = 0.05
        for token, logit in logits.items():
            weights["embedding"][token, 0] = 3 + logit / 12  # times the norm of 4, and the scale
        return weights

    return make


@pytest.fixture(scope="session")
def responder(tmp_path_factory):
    """`responder(weights, template, max_new_tokens=..., batch=..., **sampler)`: a run that answers;
    it was not trained, so it is on no disk."""

    def make(weights, template="chatml", *, max_new_tokens=40, batch=8, **sampler):
        folder = tmp_path_factory.mktemp("run")
        (folder / "config.json").write_text("{}")
        ByteTokenizer().save(folder / "tokenizer")
        meta = {"stage": "sft", "model": resolved(MODEL.config), "lineage": []}
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        run = LoadedRun(
            Stored(folder, 1, meta), MODEL, jax.tree.map(jax.numpy.asarray, weights), mesh
        )
        return RunResponder(
            run,
            TEMPLATES[template],
            SamplerConfig(**sampler),
            max_new_tokens=max_new_tokens,
            batch=batch,
        )

    return make


@pytest.fixture(scope="session")
def user():
    """`user(text)`: a dialogue that the user begins."""
    return lambda text: (Message("user", text),)
