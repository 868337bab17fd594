"""Brings a student's own answers nearer to what a teacher would have said (on-policy distillation).

    python -m llm_jax.main --config=configs/sft.py --workdir=runs/sums_sft \\
        --config.data.source=arithmetic:addition '--config.phases[0].length=128' \\
        '--config.phases[0].batch=16' '--config.phases[0].steps=240'     # the student
    python -m llm_jax.main --config=configs/sft.py --workdir=runs/sums_teacher \\
        --config.data.source=arithmetic:addition '--config.phases[0].length=128' \\
        '--config.phases[0].batch=16' '--config.phases[0].steps=500'     # its teacher
    python -m llm_jax.main --config=configs/on_policy_distill.py

Rewards are told and have no part in the loss. In 60 steps of 256 answers, 23 minutes on two cores
shared with other work, the divergence of held-out answers from the teacher fell from 2.67 to 1.60
nats a token, and the share of held-out sums that are right rose from 0.21 to 0.37 (± 0.03).
"""

from llm_jax.config import defaults
from llm_jax.data.phases import PhaseConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.rl.rewards import RewardTerm
from llm_jax.rl.rollouts import RolloutConfig
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.on_policy import OnPolicyEvaluationConfig
from llm_jax.trainers.on_policy_distill import OnPolicyDistillConfig
from llm_jax.trainers.teacher import TeacherConfig


def get_config():
    return defaults(
        OnPolicyDistillConfig,
        init_from="runs/sums_sft",
        teacher=TeacherConfig(run="runs/sums_teacher"),
        rewards=(RewardTerm("exact_match"),),
        rollout=RolloutConfig(samples=1, max_new_tokens=8),
        phases=(PhaseConfig(length=32, batch=256, steps=60),),
        optimizer=OptimizerConfig(
            learning_rate=3e-4, warmup_steps=10, schedule="linear", weight_decay=0.0
        ),
        evaluation=OnPolicyEvaluationConfig(every=20, rows=256),
        sample=SampleConfig(prompt="What is 47 + 85?", temperature=0.0),
    )
