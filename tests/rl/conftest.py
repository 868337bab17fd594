"""A policy as rewards see it, and samples of it."""

import jax
import pytest

from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.rl.scoring import Policy, Sample


@pytest.fixture
def told():
    """What the policy's log was told."""
    return []


@pytest.fixture
def policy(told):
    return Policy(ByteTokenizer(), make_mesh(MeshConfig(), jax.devices()[:1]), told.append)


@pytest.fixture(scope="session")
def sample():
    """`sample(completion, number=..., prompt=..., finished=..., **row)`, in bytes."""

    def make(completion, *, number=0, prompt="What?", finished=True, **row):
        tokenizer = ByteTokenizer()
        prompt_ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        ids = tokenizer.encode(completion) + [tokenizer.eos_id] * finished
        return Sample(number, prompt, completion, prompt_ids, ids, finished, row)

    return make
