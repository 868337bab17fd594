"""Pre-trains a decoder-only transformer from scratch, in phases of growing context.

    python -m llm_jax.main --config=configs/pretrain.py            # about five minutes on two cores
    python -m llm_jax.main --config=configs/pretrain.py:size=tiny  # the same in about a minute
    python -m llm_jax.main --config=configs/pretrain.py --config.data.source=corpus.jsonl

The corpus is the text of the Python installation itself: language reference, docstrings and sources
of the standard library. Other sizes are the presets of llm_jax/models/presets.py, by name:
`size=125m`, `size=llama3.1-8b`, ...; they train on 20 tokens a parameter, of mixtures of experts a
parameter that a token meets.

`mesh=v5e-16`, `mesh=h100x64`, ... lays the model out over a cluster of llm_jax/scaling/presets.py,
and says why so: `--config=configs/pretrain.py:size=llama2-7b,mesh=v5e-16`.
"""

import dataclasses

from llm_jax.checkpoint import CheckpointConfig
from llm_jax.config import build, defaults, parse_argument
from llm_jax.data.corpus import DataConfig
from llm_jax.data.phases import PhaseConfig
from llm_jax.data.tokenizers import TokenizerConfig
from llm_jax.errors import UserError, did_you_mean
from llm_jax.mesh import MeshConfig
from llm_jax.models.config import ModelConfig
from llm_jax.models.presets import PRESETS
from llm_jax.models.size import active_parameter_count
from llm_jax.objectives.lm import LossConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.scaling.divisibility import check_mesh
from llm_jax.scaling.planner import Job, plan_and_tell
from llm_jax.scaling.presets import find_cluster
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.foundation import asked_model
from llm_jax.trainers.pretrain import PretrainConfig, PretrainEvaluationConfig

TOKENS_A_PARAMETER = 20  # Hoffmann et al. 2022, arXiv:2203.15556
TOKENS_A_STEP = 2**19


def get_config(argument=None):
    values = parse_argument(argument, size="default", mesh="")
    config = _of_size(values["size"])
    if values["mesh"]:
        _lay_out(config, find_cluster(values["mesh"]))
    return config


def _of_size(size):
    if size == "default":
        return _default()
    if size == "tiny":
        return _tiny()
    if size not in PRESETS:
        raise UserError(f"size={size!r} is unknown.{did_you_mean(size, ['default', *PRESETS])}")
    return _preset(PRESETS[size])


def _lay_out(config, cluster):
    """Sets the mesh, and how batches are cut, for a cluster; the longest rows decide."""
    settings = build(PretrainConfig, config)
    model = asked_model(settings)
    longest = max(settings.phases, key=lambda phase: phase.length)
    job = Job(model, longest.length, longest.batch, settings.optimizer, settings.loss.chunk)
    found = plan_and_tell(job, cluster)
    for phase in settings.phases:
        check_mesh(model, found.mesh, phase.length, phase.batch)
    config.mesh = defaults(MeshConfig, **dataclasses.asdict(found.mesh))
    config.step.micro_batch_tokens = found.micro_batch_tokens


def _default():
    return defaults(
        PretrainConfig,
        model=ModelConfig(
            embed_dim=128, num_layers=4, num_heads=4, mlp_dim=352, max_length=1024, qk_norm="head"
        ),
        tokenizer=TokenizerConfig(vocab_size=2048),
        phases=(
            PhaseConfig(length=128, batch=16, steps=420),
            PhaseConfig(length=256, batch=8, steps=150, rope_theta=40_000.0, rewarm_steps=10),
        ),
        optimizer=OptimizerConfig(name="muon", learning_rate=4e-3, warmup_steps=50),
        sample=SampleConfig(prompt="def "),
    )


def _tiny():
    return defaults(
        PretrainConfig,
        model=ModelConfig(embed_dim=64, num_layers=2, num_heads=2, mlp_dim=176, max_length=512),
        tokenizer=TokenizerConfig(vocab_size=1024, train_bytes=2 * 1024 * 1024),
        phases=(
            PhaseConfig(length=64, batch=16, steps=300),
            PhaseConfig(length=128, batch=8, steps=60, rope_theta=40_000.0),
        ),
        optimizer=OptimizerConfig(learning_rate=8e-3, warmup_steps=20),
        evaluation=PretrainEvaluationConfig(every=100, rows=32),
        checkpoint=CheckpointConfig(every=20),
        sample=SampleConfig(prompt="def ", max_new_tokens=32),
    )


def _preset(model):
    has_whole_patterns = model.num_layers % len(model.windows) == 0
    model = dataclasses.replace(
        model, dtype="bfloat16", scan_layers=has_whole_patterns, remat="full"
    )
    vocabulary = model.vocab_size or 32_768
    parameters = active_parameter_count(dataclasses.replace(model, vocab_size=vocabulary))
    return defaults(
        PretrainConfig,
        model=model,
        tokenizer=TokenizerConfig(vocab_size=vocabulary),
        data=DataConfig(packing="best_fit"),
        loss=LossConfig(chunk=512, z_loss=1e-4),
        phases=_phases(model.max_length, TOKENS_A_PARAMETER * parameters),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=1000, schedule="wsd"),
        mesh=MeshConfig(data=1, fsdp=-1),
        evaluation=PretrainEvaluationConfig(every=1000, rows=1024),
        checkpoint=CheckpointConfig(every=1000),
    )


def _phases(max_length, tokens):
    """A fifth of the tokens at 4,096, the rest at 2,048, as far as the model's positions go."""
    short, long = 2048, 4096
    if max_length < long:
        length = min(short, max_length)
        return (PhaseConfig(length=length, batch=TOKENS_A_STEP // length, tokens=tokens),)
    return (
        PhaseConfig(length=short, batch=TOKENS_A_STEP // short, tokens=int(0.8 * tokens)),
        PhaseConfig(
            length=long, batch=TOKENS_A_STEP // long, tokens=int(0.2 * tokens), rewarm_steps=100
        ),
    )
