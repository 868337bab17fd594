"""Writes grpo.npz: the losses of GRPO's variants by TRL's own trainer.

Imports nothing of llm_jax, so that it is an independent judge. `GRPOTrainer._compute_loss` gets
given log-probabilities in place of a model's. Made with torch 2.13, trl 1.16:

    pip install torch transformers trl && python tests/golden/make_grpo.py

The file holds `logprobs`, `old_logprobs`, `reference_logprobs`, `entropies` and `mask`, all of
[batch, time]; `advantages`, [batch]; the settings `epsilon`, two numbers, `beta` and
`max_completion_length`; `loss/NAME` and `gradient/NAME`, by the log-probabilities; `metrics/NAME`.
"""

from __future__ import annotations

import collections
import types
from pathlib import Path

import numpy as np
import torch
from trl import GRPOTrainer

OUTPUT = Path(__file__).with_name("grpo.npz")
EPSILON, BETA, MAX_COMPLETION_LENGTH = (0.2, 0.28), 0.04, 16
LENGTHS, TIME = [7, 1, 4, 6, 3], 7
VARIANTS = {
    "grpo": ("grpo", "token"),
    "bnpo": ("bnpo", "token"),
    "dapo": ("dapo", "token"),
    "dr_grpo": ("dr_grpo", "token"),
    "gspo": ("grpo", "sequence"),
}
METRICS = {
    "kl": "kl",
    "entropy": "entropy",
    "clip_ratio/low_mean": "clip_fraction_low",
    "clip_ratio/high_mean": "clip_fraction_high",
    "clip_ratio/region_mean": "clip_fraction",
}


def make_inputs() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shape = (len(LENGTHS), TIME)
    logprobs = -draw.gamma(2.0, 0.7, shape)
    return {
        "logprobs": logprobs.astype(np.float32),
        "old_logprobs": (logprobs + draw.normal(0, 0.3, shape)).astype(np.float32),
        "reference_logprobs": (logprobs + draw.normal(0, 0.5, shape)).astype(np.float32),
        "entropies": draw.gamma(2.0, 0.7, shape).astype(np.float32),
        "mask": (np.arange(TIME) < np.array(LENGTHS)[:, None]).astype(np.float32),
        "advantages": np.array([1.1, -0.7, -1.2, 0.0, 0.8], np.float32),
    }


def make_trainer(loss_type: str, level: str, logprobs: torch.Tensor, entropies: torch.Tensor):
    """What `_compute_loss` reads of a trainer."""
    return types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropies, None),
        accelerator=types.SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x, sync_gradients=True
        ),
        args=types.SimpleNamespace(
            delta=None, use_bias_correction_kl=False, steps_per_generation=1
        ),
        _metrics={"train": collections.defaultdict(list)},
        model=types.SimpleNamespace(training=True),
        aux_loss_enabled=False,
        beta=BETA,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        epsilon_low=EPSILON[0],
        epsilon_high=EPSILON[1],
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=MAX_COMPLETION_LENGTH,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )


def main() -> None:
    inputs = make_inputs()
    arrays = dict(inputs) | {
        "epsilon": np.array(EPSILON),
        "beta": np.array(BETA),
        "max_completion_length": np.array(MAX_COMPLETION_LENGTH),
    }
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    for name, (loss_type, level) in VARIANTS.items():
        logprobs = tensors["logprobs"].clone().requires_grad_()
        trainer = make_trainer(loss_type, level, logprobs, tensors["entropies"])
        ids = torch.zeros(tensors["mask"].shape, dtype=torch.long)
        loss = GRPOTrainer._compute_loss(
            trainer,
            None,
            {
                "prompt_ids": ids,
                "prompt_mask": ids,
                "completion_ids": ids,
                "completion_mask": tensors["mask"],
                "advantages": tensors["advantages"],
                "old_per_token_logps": tensors["old_logprobs"],
                "ref_per_token_logps": tensors["reference_logprobs"],
                "num_items_in_batch": tensors["mask"].sum(),
            },
        )
        loss.backward()
        arrays[f"loss/{name}"] = loss.detach().numpy()
        arrays[f"gradient/{name}"] = logprobs.grad.numpy()
        if name == "grpo":
            for theirs, ours in METRICS.items():
                arrays[f"metrics/{ours}"] = np.float32(trainer._metrics["train"][theirs][-1])
    np.savez_compressed(OUTPUT, **arrays)


if __name__ == "__main__":
    main()
