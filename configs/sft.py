"""Fine-tunes a pre-trained run on conversations: the loss counts the assistant's turns alone.

    python -m llm_jax.main --config=configs/sft.py                      # after configs/pretrain.py
    python -m llm_jax.main --config=configs/sft.py:lora=8               # adapters of rank 8 alone
    python -m llm_jax.main --config=configs/sft.py \\
        --config.init_from=RUN --config.data.source=F.jsonl

The default data are questions about the standard library, answered by its docstrings. About two
minutes on two fast cores: the loss of held-out answers falls from 6.18 to 2.6, and token F1 of
generated ones rises from 0.02 to 0.5.
"""

from llm_jax.config import defaults, parse_argument
from llm_jax.data.phases import PhaseConfig
from llm_jax.models.config import ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.sft import SFTConfig


def get_config(argument=None):
    rank = parse_argument(argument, lora="")["lora"]
    return defaults(
        SFTConfig,
        init_from="runs/pretrain",
        model=ModelConfig(lora=LoraConfig(rank=int(rank)) if rank else None),
        phases=(PhaseConfig(length=256, batch=8, steps=400),),
        optimizer=OptimizerConfig(
            name="adamw" if rank else "muon",
            learning_rate=5e-3 if rank else 2e-3,
            warmup_steps=20,
            schedule="linear",
            final_learning_rate_ratio=0.0,
        ),
        sample=SampleConfig(prompt="What does shutil.copyfile(src, dst) do?", temperature=0.0),
    )
