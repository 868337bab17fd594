"""Lengthens the context in six gated phases, on text mixed with needle-in-a-haystack rows.

    python -m llm_jax.main --config=configs/context_extension.py

About five minutes on two fast cores. The first gate holds, at a needle accuracy of about 0.8,
and opens above 0.9; the run ends at length 1024 with accuracy 0.99 and 1.81 bits per byte.

The shape is that of the Llama 3 report (arXiv:2407.21783, section 3.4.2): the last length is
sixteen times the first, the RoPE base grows on the way, and a phase ends only when short-context
loss has recovered and the needle is found at the phase's length.
"""

from llm_jax.config import defaults
from llm_jax.data.corpus import MAIN, NEEDLE, DataConfig
from llm_jax.data.needle import NeedleConfig
from llm_jax.data.phases import GateConfig, PhaseConfig
from llm_jax.data.tokenizers import TokenizerConfig
from llm_jax.models.config import ModelConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.pretrain import PretrainConfig, PretrainEvaluationConfig

TOKENS_A_STEP = 4096
# (length, planned steps, RoPE base)
SHAPE = (
    (64, 300, 10_000.0),
    (128, 150, 20_000.0),
    (256, 150, 40_000.0),
    (384, 150, 80_000.0),
    (512, 150, 160_000.0),
    (1024, 150, 500_000.0),
)


def get_config():
    return defaults(
        PretrainConfig,
        # Norms on queries and keys, and Muon: without them a model of this size copies one of the
        # values that it sees for thousands of steps before it looks at the names.
        model=ModelConfig(
            embed_dim=96, num_layers=2, num_heads=2, mlp_dim=256, max_length=1024, qk_norm="head"
        ),
        tokenizer=TokenizerConfig(vocab_size=1024),
        # Answers weigh ten times as much as text. The first phase is needle rows alone, full of
        # questions: retrieval has to be there before text competes with it.
        data=DataConfig(
            needle=NeedleConfig(
                names=8, answers=16, share=0.95, answer_weight=1.0, text_weight=0.1
            ),
            weights={NEEDLE: 1.0},
        ),
        phases=tuple(
            PhaseConfig(
                length=length,
                batch=TOKENS_A_STEP // length,
                steps=steps,
                rope_theta=theta,
                weights={MAIN: 0.5, NEEDLE: 0.5} if index else {},
                rewarm_steps=20 if index else 0,
                gate=GateConfig(check_every=100, max_extra_steps=2000),
            )
            for index, (length, steps, theta) in enumerate(SHAPE)
        ),
        optimizer=OptimizerConfig(
            name="muon", learning_rate=3e-3, warmup_steps=50, schedule="constant"
        ),
        evaluation=PretrainEvaluationConfig(every=100, rows=64, needles_per_depth=16),
        sample=SampleConfig(prompt="def "),
    )
