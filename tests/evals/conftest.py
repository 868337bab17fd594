"""A tiny model on bytes as the subject of tasks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.data.templates import TEMPLATES
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.evals.held_out import MemoryTexts
from llm_jax.evals.subject import Subject
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.sharding import unbox

MODEL = LanguageModel(
    ModelConfig(vocab_size=320, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, max_length=256)
)


@pytest.fixture(scope="session")
def params():
    """Parameters that make logits far from uniform."""
    rng = np.random.default_rng(0)
    shapes = unbox(jax.eval_shape(MODEL.init, jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), shapes)


@pytest.fixture(scope="session")
def uniform(params):
    """Parameters whose logits are all zero."""
    return jax.tree.map(jnp.zeros_like, params)


@pytest.fixture(scope="module")  # what follows the module must not find its mesh entered
def plain_subject():
    """A model without a chat template; it writes lines for the user nowhere."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield Subject("the model", MODEL, ByteTokenizer(), None, mesh, 64, lambda line: None)


@pytest.fixture(scope="module")
def subject(plain_subject):
    """The same with a chat template."""
    return dataclasses.replace(plain_subject, template=TEMPLATES["chatml"])


@pytest.fixture(scope="session")
def all_logprobs(params):
    """`all_logprobs(ids)`: float32 [tokens, vocab], by a plain forward pass over all of them."""

    @jax.jit
    def compute(ids):
        hidden, _ = MODEL.apply(params, ids[None])
        return jax.nn.log_softmax(MODEL.logits(params, hidden))[0]

    def padded(ids):
        whole = np.zeros(256, np.int32)
        whole[: len(ids)] = ids
        return np.asarray(compute(whole))[: len(ids)]

    return padded


@pytest.fixture(scope="session")
def texts_of():
    """`texts_of(*texts)`: tokenised documents in memory."""
    tokenizer = ByteTokenizer()

    def make(*texts):
        documents = [[tokenizer.bos_id, *tokenizer.encode(t), tokenizer.eos_id] for t in texts]
        offsets = np.cumsum([0, *map(len, documents)])
        return MemoryTexts(np.concatenate(documents).astype(np.int32), offsets)

    return make
