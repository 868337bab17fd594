"""A run directory without its training."""

import jax
import numpy as np
import pytest

from llm_jax import sharding
from llm_jax.checkpoint import CheckpointConfig, Checkpointer
from llm_jax.config import resolved
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.heads import init_reward_head
from llm_jax.types import TrainState


@pytest.fixture(scope="session")
def tiny_model():
    return LanguageModel(
        ModelConfig(vocab_size=320, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16,
                    max_length=64)
    )  # fmt: skip


@pytest.fixture(scope="session")
def random_params(tiny_model):
    """`random_params(seed)`: parameters that make logits far from uniform."""

    def make(seed):
        rng = np.random.default_rng(seed)
        shapes = sharding.unbox(jax.eval_shape(tiny_model.init, jax.random.key(0)))
        return jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)

    return make


@pytest.fixture(scope="session")
def save_run(tiny_model, random_params):
    """`save_run(folder, steps, head, **meta)`: a run of the tiny model on bytes, with checkpoints
    whose parameters are made of their numbers, and a reward head where that is asked for."""

    def save(folder, steps, head=False, **meta):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        ByteTokenizer().save(folder / "tokenizer")
        checkpointer = Checkpointer(folder, CheckpointConfig(keep_latest=2))
        meta = {"stage": "pretrain", "model": resolved(tiny_model.config), "lineage": [], **meta}
        for step in steps:
            params = jax.tree.map(jax.numpy.asarray, random_params(step))
            if head:
                params |= sharding.unbox(init_reward_head(jax.random.key(step), 16))
            state = TrainState(jax.numpy.int32(step), params, {}, jax.random.key(0))
            checkpointer.save(step, state, params, {}, meta)
        checkpointer.wait()
        checkpointer.close()
        return folder

    return save
