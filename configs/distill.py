"""Trains a small student from scratch on conversations and on what a fine-tuned teacher says there.

    python -m llm_jax.main --config=configs/distill.py                    # after configs/sft.py
    python -m llm_jax.main --config=configs/distill.py --config.top_k=32  # kept on disk
    python -m llm_jax.main --config=configs/distill.py --config.teacher.run=RUN \\
        --config.init_from=SMALLER --config.data.source=F.jsonl

The default data are those of configs/sft.py. Six minutes on two busy cores: the loss of held-out
answers ends at 3.05 and the student agrees with its teacher on 0.69 of the tokens. With
`--config.loss.alpha=1`, which is fine-tuning alone, it is 3.24 and 0.63 after as many steps; the
teacher's own is 2.61.
"""

from llm_jax.config import defaults
from llm_jax.data.phases import PhaseConfig
from llm_jax.models.config import ModelConfig
from llm_jax.objectives.distill import LossConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.distill import DistillConfig
from llm_jax.trainers.teacher import TeacherConfig


def get_config():
    return defaults(
        DistillConfig,
        teacher=TeacherConfig(run="runs/sft"),
        model=ModelConfig(embed_dim=64, num_layers=2, num_heads=4, mlp_dim=192),
        loss=LossConfig(alpha=0.2, temperature=1.0),
        phases=(PhaseConfig(length=256, batch=8, steps=400),),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=5e-3,
            warmup_steps=20,
            schedule="linear",
            final_learning_rate_ratio=0.0,
        ),
        sample=SampleConfig(prompt="What does shutil.copyfile(src, dst) do?", temperature=0.0),
    )
