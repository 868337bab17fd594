"""Lengthens the context in six gated phases, on text mixed with needle-in-a-haystack rows.

    python -m llm_jax.main --config=configs/context_extension.py

About five minutes on two fast cores. With seed 0 the needle is found at step 200 (accuracy 0.96),
and the run ends at length 1024 with accuracy 1.00 and 1.56 bits per byte. Whether it is found does
not hang on the seed: of the seeds 0 to 5, five were above 0.9 at step 200 and the sixth at 250.

The shape is that of the Llama 3 report (arXiv:2407.21783, section 3.4.2): the last length is
sixteen times the first, the RoPE base grows on the way, and a phase ends only when short-context
loss has recovered and the needle is found at the phase's length.

    python -m llm_jax.main --config=configs/context_extension.py:size=llama3.1-8b \\
        --config.init_from=RUN --config.data.source=... --config.mesh.context=8

goes on with a run of a published size, from 8K to 128K tokens a row, four million a step. It has
been compiled for TPUs (`tools.estimate`), not run.
"""

import dataclasses

from llm_jax.checkpoint import CheckpointConfig
from llm_jax.config import defaults, parse_argument
from llm_jax.data.corpus import MAIN, NEEDLE, DataConfig
from llm_jax.data.needle import NeedleConfig
from llm_jax.data.phases import GateConfig, PhaseConfig
from llm_jax.data.tokenizers import TokenizerConfig
from llm_jax.errors import UserError, did_you_mean
from llm_jax.mesh import MeshConfig
from llm_jax.models.config import ModelConfig
from llm_jax.models.presets import PRESETS
from llm_jax.objectives.lm import LossConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.step import StepConfig
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


# Of published sizes, whose positions reach so far: (length, planned steps).
LONG_TOKENS_A_STEP = 2**22
LONG_SHAPE = (
    (8_192, 400), (16_384, 400), (32_768, 400), (65_536, 400), (98_304, 400), (131_072, 800),
)  # fmt: skip


def get_config(argument=None):
    size = parse_argument(argument, size="default")["size"]
    return _default() if size == "default" else _preset(size)


def _preset(size):
    if size not in PRESETS or PRESETS[size].max_length < LONG_SHAPE[-1][0]:
        known = [name for name, m in PRESETS.items() if m.max_length >= LONG_SHAPE[-1][0]]
        raise UserError(
            f"size={size!r} has no positions up to {LONG_SHAPE[-1][0]:,}."
            f"{did_you_mean(size, ['default', *known])}"
        )
    model = PRESETS[size]
    whole_patterns = model.num_layers % len(model.windows) == 0
    longest = LONG_SHAPE[-1][0]
    return defaults(
        PretrainConfig,
        model=dataclasses.replace(
            model, dtype="bfloat16", scan_layers=whole_patterns, remat="full"
        ),
        tokenizer=TokenizerConfig(vocab_size=model.vocab_size or 32_768),
        data=DataConfig(packing="best_fit", needle=NeedleConfig(share=0.001)),
        loss=LossConfig(chunk=2048, z_loss=1e-4),
        phases=tuple(
            PhaseConfig(
                length=length,
                # A multiple of the 8 batch shards of fsdp=8.
                batch=LONG_TOKENS_A_STEP // length // 8 * 8,
                steps=steps,
                weights={MAIN: 0.999, NEEDLE: 0.001},
                gate=GateConfig(check_every=50, max_extra_steps=400),
            )
            for length, steps in LONG_SHAPE
        ),
        optimizer=OptimizerConfig(learning_rate=8e-5, warmup_steps=100, schedule="constant"),
        mesh=MeshConfig(data=1, fsdp=-1),
        # As many tokens at once on a batch shard as the longest row has.
        step=StepConfig(micro_batch_tokens=longest),
        evaluation=PretrainEvaluationConfig(every=200, rows=64),
        checkpoint=CheckpointConfig(every=200),
    )


def _default():
    return defaults(
        PretrainConfig,
        # To match names takes two layers (Olsson et al. 2022, "In-context Learning and Induction
        # Heads"): the first writes to a value which name stands before it, the second looks for the
        # name. A first layer that sees eight tokens has little else to write, from the first step
        # on. One that sees the whole row has to learn where to look while nothing reads it yet:
        # then the model still copied any value in sight at step 1,900.
        model=ModelConfig(
            embed_dim=96,
            num_layers=2,
            num_heads=2,
            mlp_dim=256,
            max_length=1024,
            qk_norm="head",
            attention_pattern=("local", "global"),
            window=8,
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
