"""Writes distill.npz: the divergences of TRL's trainer of generalised knowledge distillation.

Imports nothing of llm_jax, so that it is an independent judge. Made with torch 2.13, trl 1.16:

    pip install torch transformers trl && python tests/golden/make_distill.py

The file holds `teacher` and `student`, logits of [batch, time, vocabulary]; `mask`, [batch, time];
`beta`, [settings], `temperature`, [settings]; `loss`, [settings], the sum over the mask divided by
its number; `gradient`, [settings, batch, time, vocabulary], by the student's logits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from trl.experimental.gkd import GKDTrainer

OUTPUT = Path(__file__).with_name("distill.npz")
SHAPE = (3, 5, 13)
LENGTHS = [5, 2, 4]
SETTINGS = [(b, t) for b in (0.0, 0.1, 0.5, 0.9, 1.0) for t in (1.0, 2.5)]
IGNORED = -100


def main() -> None:
    draw = np.random.default_rng(0)
    arrays = {
        "teacher": draw.normal(0, 2, SHAPE).astype(np.float32),
        "student": draw.normal(0, 2, SHAPE).astype(np.float32),
        "mask": (np.arange(SHAPE[1]) < np.array(LENGTHS)[:, None]).astype(np.float32),
        "beta": np.array([beta for beta, _ in SETTINGS], np.float32),
        "temperature": np.array([temperature for _, temperature in SETTINGS], np.float32),
    }
    labels = torch.where(torch.tensor(arrays["mask"]) > 0, 1, IGNORED)
    losses, gradients = [], []
    for beta, temperature in SETTINGS:
        student = torch.tensor(arrays["student"], requires_grad=True)
        teacher = torch.tensor(arrays["teacher"])
        loss = GKDTrainer.generalized_jsd_loss(
            student, teacher, labels=labels, beta=beta, temperature=temperature
        )
        loss.backward()
        assert student.grad is not None
        losses.append(loss.item())
        gradients.append(student.grad.numpy())
    np.savez_compressed(
        OUTPUT, **arrays, loss=np.array(losses, np.float32), gradient=np.stack(gradients)
    )


if __name__ == "__main__":
    main()
