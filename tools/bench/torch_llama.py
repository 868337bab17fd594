"""Training speed of transformers' LlamaForCausalLM on this machine: the yardstick of `tools.bench`.

Needs torch and transformers only, in whichever interpreter runs it; it imports nothing of llm_jax:

    python tools/bench/torch_llama.py --embed_dim=320 --num_layers=6 --batch=16 --length=256

Prints one JSON line: {"tokens_per_second", "step_seconds", "loss", "compile_seconds", "settings"}.
A step is forward, backward, gradient clipping and fused AdamW on random tokens without padding.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import transformers


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--embed_dim", type=int, default=320)
    parser.add_argument("--num_layers", type=int, default=6)
    parser.add_argument("--num_heads", type=int, default=5)
    parser.add_argument("--num_kv_heads", type=int, help="default: num_heads")
    parser.add_argument("--mlp_dim", type=int, default=864)
    parser.add_argument("--untied", action="store_true", help="an output projection of its own")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--micro_batch", type=int, help="sequences a pass; default: batch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="bfloat16 is autocast over float32 parameters")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--warmup", type=int, default=3, help="steps not timed")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def make_step(settings: argparse.Namespace) -> Callable[[], float]:
    """A function that trains on one batch and returns the loss."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.embed_dim,
        intermediate_size=settings.mlp_dim,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads or settings.num_heads,
        max_position_embeddings=settings.length,
        tie_word_embeddings=not settings.untied,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config).to(settings.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    forward = torch.compile(model) if settings.compile else model
    rows = settings.micro_batch or settings.batch
    if settings.batch % rows:
        raise SystemExit(f"--micro_batch={rows} does not divide --batch={settings.batch}")
    generator = torch.Generator().manual_seed(0)

    def autocast() -> contextlib.AbstractContextManager:
        if settings.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(settings.device, dtype=torch.bfloat16)

    def step() -> float:
        shape = (settings.batch, settings.length)
        tokens = torch.randint(settings.vocab_size, shape, generator=generator)
        total = 0.0
        optimizer.zero_grad()
        for part in tokens.to(settings.device).split(rows):
            with autocast():
                loss = forward(input_ids=part, labels=part).loss * (rows / settings.batch)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total

    return step


def main(arguments: list[str]) -> None:
    settings = parse(arguments)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    step = make_step(settings)
    start = time.perf_counter()
    step()
    compile_seconds = time.perf_counter() - start
    for _ in range(settings.warmup - 1):
        step()
    seconds = []
    loss = 0.0
    for _ in range(settings.steps):
        start = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - start)
    tokens = settings.batch * settings.length
    result = {
        "tokens_per_second": tokens / statistics.median(seconds),
        "step_seconds": seconds,
        "loss": loss,
        "compile_seconds": compile_seconds,
        "settings": {
            **vars(settings),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
