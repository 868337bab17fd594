"""Writes families/ and peft/: tiny random checkpoints of every family, by transformers and peft.

Imports nothing of llm_jax, so that it is an independent judge. Made with torch 2.13, transformers
5.23, peft 0.21; names after the script limit it to those folders:

    pip install torch transformers peft && python tests/golden/make_families.py [NAME ...]

A folder is what `save_pretrained` writes, and expected.npz, all computed in float32:

    input_ids, attention_mask, position_ids   int32 [3, time], rows padded on the left
    logits          float32 [3, time, vocab]; 0 at padding
    greedy          int32 [3, 8]: each row goes on alone, everything read anew for every token
    greedy_cached   the same by `generate` with its KV cache, for RoPE that depends on the length
    short/...       the same arrays of a shorter batch, for RoPE that depends on the length
    router_logits   float32 [layers, 3, time, experts]; 0 at padding
    aux_loss        float32, the load-balancing loss of the batch without its coefficient
    scores          float32 [3], of classifiers (without logits and greedy)

Rows padded on the right give the same within 1e-4, which is checked here. A config_old.json is the
same model in the spelling of files published in 2024 and 2025. A folder of peft/ has adapters and
the batch and logits of the base in families/ that its adapter_config.json names.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from families_variants import ADAPTERS, SHAPE, VARIANTS, Adapter, Variant

FAMILIES = Path(__file__).with_name("families")
PEFT = Path(__file__).with_name("peft")
LENGTHS = (24, 15, 9)
NEW_TOKENS, DISTINCT = 8, 3
FIRST_TOKEN, LAST_TOKEN = 3, 90  # neither special tokens nor those of images
MARGIN = 3e-3  # by which a greedy token and a chosen expert lead, so that rounding decides nothing


class Unsuitable(Exception):
    """Weights at which a choice of tokens or experts is too close, or greedy text says little."""


def make_batch(lengths: tuple[int, ...], left: bool = True) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    T = max(lengths)
    ids, mask = torch.zeros(2, len(lengths), T, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(T - length, T) if left else slice(0, length)
        ids[row, place] = torch.randint(FIRST_TOKEN, LAST_TOKEN, (length,), generator=draw)
        mask[row, place] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return dict(input_ids=ids, attention_mask=mask, position_ids=positions)


def make_model(variant: Variant) -> torch.nn.Module:
    """Values at which every weight matters: gains around 1 (Gemma's around 0), matrices by which
    attention is not uniform, logits of order 1 to 10 and routing decided."""
    architecture = getattr(transformers, variant.architecture)
    shape = {key: x for key, x in SHAPE.items() if hasattr(architecture.config_class, key)}
    config = architecture.config_class(**copy.deepcopy({**shape, **variant.config}))
    config._attn_implementation = "eager"
    model = architecture(config).eval()
    gemma = "gemma" in config.model_type
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if ("norm" in name or ".ln_" in name) and name.endswith("weight"):
            parameter.data = 0.3 * noise + (0.0 if gemma and "vision" not in name else 1.0)
        elif name.endswith("bias"):
            parameter.data = 0.3 * noise
        elif any(part in name for part in ("embed", "wte", "wpe")):
            parameter.data = variant.embedding_scale * noise
        elif name.endswith(("mlp.gate.weight", "router.weight", "block_sparse_moe.gate.weight")):
            parameter.data = 0.5 * noise
        else:
            parameter.data = 0.25 * noise
        # Values are those of the stored dtype, computation is in float32.
        parameter.data = parameter.data.to(getattr(torch, variant.dtype)).float()
    return model


@torch.no_grad()
def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor], **options):
    """On a copy, because RoPE that depends on the length keeps that of earlier calls."""
    return copy.deepcopy(model)(**batch, use_cache=False, **options)


def decided(values: torch.Tensor, count: int) -> None:
    """Raises Unsuitable unless the `count` largest of the last axis lead over the others."""
    top = values.topk(count + 1).values
    if (top[..., -2] - top[..., -1]).min() < MARGIN:
        raise Unsuitable


def greedy(model: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
    for _ in range(NEW_TOKENS):
        logits = forward(model, dict(input_ids=row[None])).logits[0, -1]
        decided(logits, 1)
        row = torch.cat([row, logits.argmax()[None]])
    tokens = row[-NEW_TOKENS:]
    if tokens.min() < FIRST_TOKEN or len(tokens.unique()) < DISTINCT:
        raise Unsuitable
    return tokens


def greedy_cached(model: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
    options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    output = copy.deepcopy(model).generate(
        row[None], **options, output_logits=True, return_dict_in_generate=True
    )
    decided(torch.stack(output.logits), 1)
    return output.sequences[0, len(row) :]


def expected_of(model: torch.nn.Module, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    batch = make_batch(lengths)
    if "SequenceClassification" in type(model).__name__:
        scores = forward(model, batch).logits[:, 0]
        right = forward(model, make_batch(lengths, left=False)).logits[:, 0]
        torch.testing.assert_close(scores, right, rtol=0, atol=1e-4)
        return {**batch, "scores": scores}
    real = batch["attention_mask"].bool()
    experts = getattr(model.config, "num_experts_per_tok", None)
    output = forward(model, batch, **({"output_router_logits": True} if experts else {}))
    right = make_batch(lengths, left=False)
    logits_right = forward(model, right).logits[right["attention_mask"].bool()]
    torch.testing.assert_close(output.logits[real], logits_right, rtol=0, atol=1e-4)
    rows = [ids[mask] for ids, mask in zip(batch["input_ids"], real, strict=True)]
    arrays = {
        **batch,
        "logits": output.logits * real[..., None],
        "greedy": torch.stack([greedy(model, row) for row in rows]),
    }
    if experts:
        router = torch.stack([x.view(*real.shape, -1) for x in output.router_logits])
        decided(router[:, real], experts)
        arrays |= {"router_logits": router * real[..., None], "aux_loss": output.aux_loss}
    if rope_type_of(model) in ("dynamic", "longrope"):
        arrays["greedy_cached"] = torch.stack([greedy_cached(model, row) for row in rows])
    return arrays


def rope_type_of(model: torch.nn.Module) -> str | None:
    return (getattr(model.config, "rope_parameters", None) or {}).get("rope_type")


def draw_model(name: str, variant: Variant) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The first random model of the variant that suits, and what it gives."""
    for attempt in range(1000):
        torch.manual_seed(zlib.crc32(name.encode()) + attempt)
        model = make_model(variant)
        try:
            arrays = expected_of(model, LENGTHS)
            if variant.short:
                short = expected_of(model, variant.short)
                arrays |= {f"short/{key}": value for key, value in short.items()}
        except Unsuitable:
            continue
        return model, arrays
    raise RuntimeError(f"no weights for {name}")


def write_family(name: str, variant: Variant) -> None:
    folder = FAMILIES / name
    shutil.rmtree(folder, ignore_errors=True)
    model, arrays = draw_model(name, variant)
    stored = copy.deepcopy(model).to(getattr(torch, variant.dtype))
    size = sum(x.numel() * x.element_size() for x in stored.parameters())
    stored.save_pretrained(folder, max_shard_size=int(size / variant.shards * 1.1) + 1)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) == variant.shards
    if variant.old is not None:
        config = json.loads((folder / "config.json").read_text())
        for key in variant.dropped:
            config.pop(key, None)
        text = json.dumps({**config, **variant.old, "transformers_version": "4.51.0"}, indent=2)
        (folder / "config_old.json").write_text(text + "\n")
    check_family(folder, type(model), arrays)
    save_arrays(folder, arrays)


def check_family(folder: Path, architecture: type, arrays: dict[str, torch.Tensor]) -> None:
    """The folder, by either config, is read back to a model with exactly the same results."""
    for file in folder.glob("config*.json"):
        with tempfile.TemporaryDirectory() as copied:
            shutil.copytree(folder, copied, dirs_exist_ok=True)
            shutil.copy(file, Path(copied) / "config.json")
            options = dict(dtype=torch.float32, attn_implementation="eager")
            model, info = architecture.from_pretrained(copied, output_loading_info=True, **options)
            assert not any(info.values()), info
            output = forward(model.eval(), make_batch(LENGTHS)).logits
        if "scores" in arrays:
            assert torch.equal(output[:, 0], arrays["scores"])
        else:
            assert torch.equal(output * arrays["attention_mask"][..., None], arrays["logits"])


def write_adapter(name: str, adapter: Adapter) -> None:
    """An adapter of a folder of families/: what peft saves, and its logits on the base's batch."""
    folder = PEFT / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(zlib.crc32(name.encode()))
    base = transformers.AutoModelForCausalLM.from_pretrained(
        FAMILIES / adapter.base, dtype=torch.float32, attn_implementation="eager"
    )
    config = peft.LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **adapter.config)
    model = peft.get_peft_model(base, config).eval()
    for parameter_name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if "magnitude" in parameter_name:
            parameter.data = parameter.data * (1 + 0.2 * noise)
        elif "lora_" in parameter_name:
            parameter.data = 0.15 * noise
    batch = make_batch(LENGTHS)
    logits = forward(model, batch).logits * batch["attention_mask"][..., None]
    base_logits = np.load(FAMILIES / adapter.base / "expected.npz")["logits"]
    assert np.abs(logits.numpy() - base_logits).max() > 0.5
    config.base_model_name_or_path = f"tests/golden/families/{adapter.base}"
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    sort_sets(folder / "adapter_config.json")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        FAMILIES / adapter.base, dtype=torch.float32, attn_implementation="eager"
    )
    again = forward(peft.PeftModel.from_pretrained(base, folder).eval(), batch).logits
    assert torch.equal(again * batch["attention_mask"][..., None], logits)
    save_arrays(folder, {**batch, "logits": logits})


def sort_sets(file: Path) -> None:
    """peft writes its set of target modules in an order that changes from run to run."""
    config = json.loads(file.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_arrays(folder: Path, arrays: dict[str, torch.Tensor]) -> None:
    numpy = {name: value.detach().numpy() for name, value in arrays.items()}
    numpy = {k: x.astype(np.int32) if x.dtype == np.int64 else x for k, x in numpy.items()}
    np.savez_compressed(folder / "expected.npz", **numpy)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name, variant in VARIANTS.items():
        if not names or name in names:
            print(name, flush=True)
            write_family(name, variant)
    for name, adapter in ADAPTERS.items():
        if not names or name in names:
            print(name, flush=True)
            write_adapter(name, adapter)


if __name__ == "__main__":
    main(sys.argv[1:])
