"""A run of seconds, for tests of several processes; its argument is a folder with its texts."""

from llm_jax.checkpoint import CheckpointConfig
from llm_jax.config import defaults
from llm_jax.data.corpus import ComponentConfig, DataConfig
from llm_jax.data.phases import PhaseConfig
from llm_jax.data.tokenizers import TokenizerConfig
from llm_jax.evals.task import TaskTerm
from llm_jax.mesh import MeshConfig
from llm_jax.metrics import MetricsConfig
from llm_jax.models.config import ModelConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.pretrain import PretrainConfig, PretrainEvaluationConfig

STEPS = 12


def get_config(folder):
    return defaults(
        PretrainConfig,
        model=ModelConfig(embed_dim=32, num_layers=1, num_heads=2, mlp_dim=64, max_length=64),
        tokenizer=TokenizerConfig(path="bytes"),
        data=DataConfig(
            source=f"{folder}/corpus.txt",
            mixture=(ComponentConfig(name="other", source=f"{folder}/other.txt"),),
            weights={"text": 3.0, "other": 1.0},
            packing="best_fit",
            validation_fraction=0.1,
        ),
        phases=(PhaseConfig(length=32, batch=8, steps=STEPS),),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        # 11 rows in batches of 8: the last batch has 3 rows, and 5 of padding.
        evaluation=PretrainEvaluationConfig(
            every=4, rows=11, tasks=(TaskTerm("perplexity", "documents", {"documents": 3}),)
        ),
        checkpoint=CheckpointConfig(every=6),
        metrics=MetricsConfig(every=1, tensorboard=False),
        sample=SampleConfig(max_new_tokens=0),
        mesh=MeshConfig(data=-1, fsdp=2),
    )
