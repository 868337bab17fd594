"""Writes preferences.npz: losses of preference learning, reward models and SFT, by TRL.

Imports nothing of llm_jax, so that it is an independent judge. TRL's own trainers tokenise, collate
and compute; what they lack is in `from_logps`. Made with torch 2.13, transformers 5.23, trl 1.16:

    pip install torch transformers trl && python tests/golden/make_preferences.py

The file holds the weights of two tiny Llamas, `policy/NAME` and `reference/NAME` by the names of
their state dicts, and of a reward head, `score.weight`; the padded token rows `pairs/...` (chosen
rows first) and `unpaired/...` (`KL_...`: each prompt with the completion of the prompt before); the
log-probabilities `logps/policy` and `logps/reference` of the pairs' rows; `loss/NAME`,
`metrics/NAME` (of sigmoid, and `metrics/kl`), and `gradient_norm/NAME` with respect to the policy.
"""

from __future__ import annotations

import copy
import os
import random
import tempfile
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import numpy as np
import tokenizers
import torch
import transformers
import trl
from datasets import Dataset
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

OUTPUT = Path(__file__).with_name("preferences.npz")
BETA, SMOOTHING, DISCOPOP_TAU = 0.3, 0.1, 0.5
MARGINS = [3.0, 2.0, 1.0, 0.0, 2 / 3, 1 / 3]
LABELS = [True, False, True, True, False, True]
DPO_LOSSES = [
    "sigmoid", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm",
]  # fmt: skip
LLAMA = transformers.LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    tie_word_embeddings=False,
    attn_implementation="eager",
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=None,
)


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a word, so that the texts say exactly which ids they become."""
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 64)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )


def make_texts() -> list[dict[str, str]]:
    """Six prompts with two answers. Their lengths differ but little, so that policy and reference
    sort the pairs differently, without which AOT is cDPO."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return "".join(f" w{draw.randrange(2, 64)}" for _ in range(length))

    lengths = [(3, 5, 4), (6, 3, 4), (2, 7, 8), (5, 4, 3), (4, 1, 2), (7, 4, 6)]
    return [
        {"prompt": text(p).strip(), "chosen": text(c), "rejected": text(r)} for p, c, r in lengths
    ]


def make_models() -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """Policy, reference (near the policy, as in training), and a reward model on the policy."""
    policy = transformers.LlamaForCausalLM(LLAMA).eval()
    for name, parameter in policy.named_parameters():
        noise = 0.2 * torch.randn_like(parameter)
        parameter.data = parameter.data * (1 + noise) if "norm" in name else noise
    reference = copy.deepcopy(policy)
    for parameter in reference.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    config = copy.deepcopy(LLAMA)
    config.num_labels = 1
    reward = transformers.LlamaForSequenceClassification(config).eval()
    reward.model.load_state_dict(policy.model.state_dict())
    reward.score.weight.data = 0.2 * torch.randn_like(reward.score.weight)
    return policy, reference, reward


class Judge:
    """TRL's trainers on CPU, with all rows as one batch."""

    def __init__(self, folder: str):
        self.policy, self.reference, self.reward = make_models()
        self.tokenizer = make_tokenizer()
        self.texts = make_texts()
        self.common = dict(
            output_dir=folder, use_cpu=True, bf16=False, report_to="none",
            per_device_train_batch_size=len(self.texts), gradient_checkpointing=False,
        )  # fmt: skip

    def trainer(self, kind, config, rows, model=None, **options):
        """A trainer on a copy of the model, because trainers patch their models."""
        return kind(
            model=copy.deepcopy(model or self.policy),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
            **options,
        )

    def dpo(self):
        config = trl.DPOConfig(
            **self.common, beta=BETA, label_smoothing=SMOOTHING, discopop_tau=DISCOPOP_TAU
        )
        reference = copy.deepcopy(self.reference)
        return self.trainer(trl.DPOTrainer, config, self.texts, ref_model=reference)

    def kto(self, swapped: bool = False):
        """`swapped`: policy and reference change places, which turns the sign of the divergence."""
        rows = [
            {
                "prompt": t["prompt"],
                "completion": t["chosen" if good else "rejected"],
                "label": good,
            }
            for t, good in zip(self.texts, LABELS, strict=True)
        ]
        config = trl.KTOConfig(
            **self.common, beta=BETA, desirable_weight=0.75, undesirable_weight=1.5
        )
        policy, reference = self.policy, self.reference
        if swapped:
            policy, reference = reference, policy
        reference = copy.deepcopy(reference)
        return self.trainer(trl.KTOTrainer, config, rows, policy, ref_model=reference)

    def simpo(self):
        config = CPOConfig(
            **self.common, loss_type="simpo", beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0
        )
        return self.trainer(CPOTrainer, config, self.texts)

    def orpo(self):
        config = ORPOConfig(**self.common, beta=BETA)
        return self.trainer(ORPOTrainer, config, self.texts)

    def sft(self):
        rows = [{"prompt": t["prompt"], "completion": t["chosen"]} for t in self.texts]
        return self.trainer(trl.SFTTrainer, trl.SFTConfig(**self.common), rows)

    def rewards(self, margins: bool = False, centring: float | None = None):
        rows = [
            text | ({"margin": margin} if margins else {})
            for text, margin in zip(self.texts, MARGINS, strict=True)
        ]
        config = trl.RewardConfig(**self.common, center_rewards_coefficient=centring)
        return self.trainer(trl.RewardTrainer, config, rows, self.reward)


def batch_of(trainer):
    rows = trainer.train_dataset
    return trainer.data_collator([rows[i] for i in range(len(rows))])


def loss_of(trainer, batch=None) -> torch.Tensor:
    trainer.model.eval()
    return trainer.compute_loss(trainer.model, dict(batch or batch_of(trainer)))


def gradient_norm(trainer, loss: torch.Tensor) -> torch.Tensor:
    parameters = list(trainer.model.parameters())
    return torch.nn.utils.get_total_norm(torch.autograd.grad(loss, parameters))


def logps_of(model, batch) -> torch.Tensor:
    """By transformers and TRL's function: the sums over completion tokens."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return CPOTrainer.get_batch_logps(logits, labels)


def metrics_of(trainer) -> dict[str, torch.Tensor]:
    return {
        f"metrics/{name}": torch.tensor(values[-1])
        for name, values in trainer._metrics["eval"].items()
        if name.startswith(("rewards/", "logps/", "kl"))
    }


def by_dpo(judge: Judge) -> dict[str, torch.Tensor]:
    trainer = judge.dpo()
    batch = batch_of(trainer)
    arrays = {f"pairs/{name}": value for name, value in batch.items()}
    for name in DPO_LOSSES:
        trainer.loss_types, trainer.loss_weights = [name], [1.0]
        arrays[f"loss/{name}"] = loss = loss_of(trainer, batch)
        arrays[f"gradient_norm/{name}"] = gradient_norm(trainer, loss)
    arrays |= metrics_of(trainer)  # the same for every loss
    arrays["logps/policy"] = logps_of(judge.policy, batch)
    arrays["logps/reference"] = logps_of(judge.reference, batch)
    return arrays


def by_kto(judge: Judge) -> dict[str, torch.Tensor]:
    trainer = judge.kto()
    batch = batch_of(trainer)
    arrays = {f"unpaired/{name}": value for name, value in batch.items()}
    arrays["loss/kto"] = loss = loss_of(trainer, batch)
    arrays["gradient_norm/kto"] = gradient_norm(trainer, loss)
    arrays["metrics/kl"] = metrics_of(trainer)["metrics/kl"]
    swapped = judge.kto(swapped=True)
    arrays["loss/kto_swapped"] = loss_of(swapped)
    assert arrays["metrics/kl"] > 0.1 and metrics_of(swapped)["metrics/kl"] == 0
    return arrays


def without_reference(judge: Judge) -> dict[str, torch.Tensor]:
    simpo, orpo = judge.simpo(), judge.orpo()
    arrays = {"loss/simpo": loss_of(simpo)}
    arrays["gradient_norm/simpo"] = gradient_norm(simpo, arrays["loss/simpo"])
    chosen, rejected, *_ = orpo.concatenated_forward(orpo.model, batch_of(orpo))
    arrays["loss/orpo_odds_ratio"] = -orpo.odds_ratio_loss(chosen, rejected)[0].mean()
    arrays["loss/sft"] = loss_of(judge.sft())
    return arrays


def by_reward(judge: Judge) -> dict[str, torch.Tensor]:
    kinds = {
        "reward": {},
        "reward_margins": {"margins": True},
        "reward_centring": {"centring": 0.01},
    }
    arrays = {f"loss/{name}": loss_of(judge.rewards(**options)) for name, options in kinds.items()}
    trainer = judge.rewards()
    rows = {name: batch_of(trainer)[name] for name in ("input_ids", "attention_mask")}
    arrays["rewards"] = judge.reward(**rows).logits[:, 0]
    arrays["margins"] = torch.tensor(MARGINS)
    arrays["score.weight"] = judge.reward.score.weight
    return arrays


def from_logps(judge: Judge, arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What no trainer computes as a whole. cDPO and IPO with summed log-ratios: the lines that
    TRL's CPOTrainer has for log-probabilities, given log-ratios. ORPO's −log p of chosen
    completions, where TRL reads the prompts too: plain torch."""
    chosen, rejected = (arrays["logps/policy"] - arrays["logps/reference"]).chunk(2)
    cpo = judge.simpo()
    cpo.beta, cpo.label_smoothing = BETA, SMOOTHING

    def loss(loss_type: str) -> torch.Tensor:
        cpo.loss_type = loss_type
        return cpo.cpo_loss(chosen, rejected)[0].mean()

    nats = -arrays["logps/policy"] / arrays["pairs/completion_mask"].sum(-1)
    return {
        "loss/sigmoid_smoothed": loss("sigmoid"),
        "loss/ipo_summed": loss("ipo"),
        "loss/orpo_nats": nats.chunk(2)[0].mean(),
    }


def main() -> None:
    torch.manual_seed(3)
    with tempfile.TemporaryDirectory() as folder:
        judge = Judge(folder)
        arrays = by_dpo(judge) | by_kto(judge) | without_reference(judge) | by_reward(judge)
        arrays |= from_logps(judge, arrays)
    assert abs(arrays["loss/aot"] - arrays["loss/sigmoid_smoothed"]) > 0.01
    for name in ("policy", "reference"):
        state = getattr(judge, name).state_dict()
        arrays |= {f"{name}/{key}": value for key, value in state.items()}
    numpy = {name: value.detach().numpy() for name, value in arrays.items()}
    small = {np.dtype(np.int64): np.int32, np.dtype(np.float64): np.float32}
    np.savez_compressed(
        OUTPUT, **{name: x.astype(small.get(x.dtype, x.dtype)) for name, x in numpy.items()}
    )


if __name__ == "__main__":
    main()
